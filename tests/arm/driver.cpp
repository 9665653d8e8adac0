// Calls a library's functions for a test that runs on another CPU (remote.py): runs in QEMU.
//
//     driver LIBRARY DESCRIPTOR ADDRESS BYTES
//
// Without arguments it prints what the CPU says of itself.
//
// The descriptor's memory is shared with the test and lies at the same address in both, so pointers
// into it are passed as they are. Calls are read from standard input and answered on standard
// output; the end of the input ends the program.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Call {
    char name[32];
    int64_t arguments[8];  // integers and pointers: no function takes anything else
};

// What `veneer_fields` returns lies in the library's own memory.
struct Field {
    const char *of, *name;
    int64_t offset, size;
};

// The fields as lines of text.
void write_fields(const Field* fields, char* to) {
    for (; fields->of != nullptr; ++fields)
        to += std::sprintf(to, "%s %s %ld %ld\n", fields->of, *fields->name ? fields->name : "-",
                           long(fields->offset), long(fields->size));
}

template <class Function>
Function* found(void* library, const char* name) {
    void* function = dlsym(library, name);
    if (function == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        std::exit(1);
    }
    return reinterpret_cast<Function*>(function);
}

}  // namespace

int main(int count, char** words) {
    if (count == 1) {
        std::FILE* file = std::fopen("/proc/cpuinfo", "r");
        for (int letter; file != nullptr && (letter = std::fgetc(file)) != EOF;)
            std::putchar(letter);
        return 0;
    }
    if (count != 5) return 2;
    void* library = dlopen(words[1], RTLD_NOW);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    void* wanted = reinterpret_cast<void*>(std::strtoull(words[3], nullptr, 0));
    void* shared = mmap(wanted, std::strtoull(words[4], nullptr, 0), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED_NOREPLACE, std::atoi(words[2]), 0);
    if (shared != wanted) {
        std::perror("mmap");
        return 1;
    }
    for (Call call; read(STDIN_FILENO, &call, sizeof call) == ssize_t(sizeof call);) {
        const int64_t* a = call.arguments;
        int64_t result = 0;
        if (std::strcmp(call.name, "veneer_fields") == 0) {
            write_fields(found<const Field*()>(library, call.name)(),
                         reinterpret_cast<char*>(a[0]));
        } else if (std::strcmp(call.name, "veneer_instructions") == 0) {
            std::strcpy(reinterpret_cast<char*>(a[0]), found<const char*()>(library, call.name)());
        } else {
            using Function =
                int64_t(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
            result =
                found<Function>(library, call.name)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
        }
        if (write(STDOUT_FILENO, &result, sizeof result) != ssize_t(sizeof result)) return 1;
    }
}
