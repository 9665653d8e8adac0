// Avoids symbols that manylinux_2_28 lacks (`SYMBOLS` of forms.py), so that what a new compiler on
// a new system compiles loads on an old one, and costs nothing where it is compiled and used.
// Beside the instruction sets, since an architecture's oldest version is that of its first glibc.
#pragma once

#include <exception>
#include <new>  // defines __GLIBC__ and __GLIBCXX__, where these libraries are used

#if defined(__GLIBC__)
// The linker takes the newest version of a symbol unless told otherwise. For a name that nothing
// refers to this does nothing.
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
// Functions of libstdc++ that GCC 11 and 14 began to call. Inline ones are weak: linked statically,
// libstdc++ has its own.
#define VENEER_OWN __attribute__((used, visibility("hidden")))
extern "C"
    [[noreturn]] VENEER_OWN void veneer_too_long() __asm__("_ZSt28__throw_bad_array_new_lengthv");
inline void veneer_too_long() { throw std::bad_alloc(); }  // as GCC 10 did
extern "C" [[noreturn]] VENEER_OWN void veneer_uncaught() __asm__("__cxa_call_terminate");
inline void veneer_uncaught() { std::terminate(); }  // out of a function that is noexcept
#undef VENEER_OWN
#endif
