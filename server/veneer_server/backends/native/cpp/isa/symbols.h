// Avoids symbols that manylinux_2_28 lacks (`SYMBOLS` of forms.py), so that a library built by a
// new compiler on a new system loads on an old one. It costs nothing where a library is built and
// used on the same system. It is in this folder because the oldest version of a symbol differs
// between architectures: it is that of the architecture's first glibc.
#pragma once

#include <exception>
#include <new>  // defines __GLIBC__ and __GLIBCXX__, where these libraries are used

#if defined(__GLIBC__)
// The linker takes the newest version of a symbol unless told otherwise. This has no effect for a
// name that nothing refers to.
#define VENEER_OLD(name, version) __asm__(".symver " name "," name "@GLIBC_" version)
#if defined(__x86_64__)
VENEER_OLD("log", "2.2.5");
VENEER_OLD("pthread_getaffinity_np", "2.3.4");
VENEER_OLD("pthread_setaffinity_np", "2.3.4");
#else
VENEER_OLD("log", "2.17");
VENEER_OLD("pthread_getaffinity_np", "2.17");
VENEER_OLD("pthread_setaffinity_np", "2.17");
#endif
#undef VENEER_OLD
#endif

#if defined(__GLIBCXX__)
// Functions of libstdc++ that GCC 11 and 14 began to call. They are inline and so weak: if
// libstdc++ is linked statically, it has its own.
#define VENEER_OWN __attribute__((used, visibility("hidden")))
extern "C"
    [[noreturn]] VENEER_OWN void veneer_too_long() __asm__("_ZSt28__throw_bad_array_new_lengthv");
inline void veneer_too_long() { throw std::bad_alloc(); }  // as GCC 10 did
extern "C" [[noreturn]] VENEER_OWN void veneer_uncaught() __asm__("__cxa_call_terminate");
inline void veneer_uncaught() { std::terminate(); }  // an exception left a noexcept function
#undef VENEER_OWN
#endif
