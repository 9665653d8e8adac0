// Executes AMX instructions on CPUs that have none: preload it (LD_PRELOAD), and what would end the
// process as an illegal instruction is decoded and done here. For tests of the compiled kernels:
// their encodings, strides, tile configurations and order of sums. Where the CPU has AMX, nothing
// is illegal and the hardware does it.
//
// After Intel's Software Developer's Manual, volume 2: LDTILECFG, TILERELEASE, TILEZERO, TILELOADD,
// TILESTORED, TDPBF16PS, TDPBSSD. What the manual calls an error ends the process.
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <cstdint>

namespace {

struct Tile {
    int rows, bytes;
    uint8_t at[16][64];
};
thread_local Tile tiles[8];
thread_local bool configured;

[[noreturn]] void fail(const char* why) {
    fprintf(stderr, "AMX emulator: %s\n", why);
    _exit(99);
}

void load_configuration(const uint8_t* from) {
    if (from[0] != 1) fail("the palette is not 1");
    for (int i = 1; i < 16; ++i)
        if (from[i] != 0) fail("a reserved byte, or the start row, is not 0");
    for (int t = 0; t < 8; ++t) {
        uint16_t bytes;
        memcpy(&bytes, from + 16 + 2 * t, 2);
        const int rows = from[48 + t];
        if (rows > 16 || bytes > 64) fail("a tile is too large");
        if ((rows == 0) != (bytes == 0)) fail("a tile has rows or bytes alone");
        tiles[t] = Tile{rows, bytes, {}};
    }
    for (int t = 8; t < 16; ++t)
        if (from[16 + 2 * t] || from[17 + 2 * t] || from[48 + t]) fail("a tile past the eighth");
    configured = true;
}

Tile& tile(int number) {
    if (!configured) fail("tiles are not configured");
    if (tiles[number].rows == 0) fail("a tile that is not configured is used");
    return tiles[number];
}

float number(const uint8_t* bf16) {
    uint32_t bits = uint32_t(bf16[0] | bf16[1] << 8) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void dot(Tile& sums, const Tile& a, const Tile& b) {
    if (sums.bytes % 4 || a.bytes % 4 || b.bytes % 4) fail("TDPBF16PS: bytes of a row");
    if (sums.rows != a.rows || a.bytes / 4 != b.rows || sums.bytes != b.bytes)
        fail("TDPBF16PS: shapes do not fit each other");
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // denormals are zero
    for (int m = 0; m < sums.rows; ++m) {
        volatile float temporary[32] = {};
        for (int k = 0; k < a.bytes / 4; ++k)
            for (int n = 0; n < sums.bytes / 4; ++n)
                for (int i = 0; i < 2; ++i)
                    temporary[2 * n + i] =
                        __builtin_fmaf(number(a.at[m] + 4 * k + 2 * i),
                                       number(b.at[k] + 4 * n + 2 * i), temporary[2 * n + i]);
        for (int n = 0; n < sums.bytes / 4; ++n) {
            float sum;
            memcpy(&sum, sums.at[m] + 4 * n, 4);
            volatile float both = temporary[2 * n] + temporary[2 * n + 1];
            sum += both;
            memcpy(sums.at[m] + 4 * n, &sum, 4);
        }
    }
    _mm_setcsr(before);
}

void dot_bytes(Tile& sums, const Tile& a, const Tile& b) {
    if (sums.bytes % 4 || a.bytes % 4 || b.bytes % 4) fail("TDPBSSD: bytes of a row");
    if (sums.rows != a.rows || a.bytes / 4 != b.rows || sums.bytes != b.bytes)
        fail("TDPBSSD: shapes do not fit each other");
    for (int m = 0; m < sums.rows; ++m)
        for (int k = 0; k < a.bytes / 4; ++k)
            for (int n = 0; n < sums.bytes / 4; ++n) {
                int32_t sum;
                memcpy(&sum, sums.at[m] + 4 * n, 4);
                for (int i = 0; i < 4; ++i)
                    sum += int8_t(a.at[m][4 * k + i]) * int8_t(b.at[k][4 * n + i]);
                memcpy(sums.at[m] + 4 * n, &sum, 4);
            }
}

// An instruction with a three-byte VEX prefix; returns its length, or 0 if it is not AMX.
int execute(const uint8_t* code, greg_t* registers) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x84) != 0) return 0;
    const int prefix = code[2] & 3, third = ~code[2] >> 3 & 15, opcode = code[3];
    const int high_index = code[1] & 0x40 ? 0 : 8, high_base = code[1] & 0x20 ? 0 : 8;
    const int mode = code[4] >> 6, first = code[4] >> 3 & 7, second = code[4] & 7;
    if (opcode == 0x5c && prefix == 2 && mode == 3) {  // TDPBF16PS
        if (first == second || first == third || second == third) fail("TDPBF16PS: one tile twice");
        dot(tile(first), tile(second), tile(third));
        return 5;
    }
    if (opcode == 0x5e && prefix == 3 && mode == 3) {  // TDPBSSD
        if (first == second || first == third || second == third) fail("TDPBSSD: one tile twice");
        dot_bytes(tile(first), tile(second), tile(third));
        return 5;
    }
    if (opcode == 0x49 && mode == 3) {
        if (prefix == 0) configured = false;  // TILERELEASE
        if (prefix == 3) memset(tile(first).at, 0, sizeof tile(first).at);  // TILEZERO
        return 5;
    }
    if (opcode != 0x4b && opcode != 0x49) return 0;
    // An address: base, index and displacement.
    int length = 5;
    uint64_t address = 0, stride = 0;
    if (second == 4) {
        const uint8_t sib = code[length++];
        const int index = (sib >> 3 & 7) + high_index, base = (sib & 7) + high_base;
        if (index != 4) stride = uint64_t(registers[order[index]]) << (sib >> 6);
        if ((sib & 7) == 5 && mode == 0) fail("an address without a base");
        address = uint64_t(registers[order[base]]);
    } else {
        if (second == 5 && mode == 0) fail("an address relative to RIP");
        address = uint64_t(registers[order[second + high_base]]);
    }
    if (mode == 1) address += uint64_t(int64_t(int8_t(code[length++])));
    if (mode == 2) {
        int32_t displacement;
        memcpy(&displacement, code + length, 4);
        address += uint64_t(int64_t(displacement)), length += 4;
    }
    if (opcode == 0x49) {  // LDTILECFG
        if (prefix != 0) return 0;
        load_configuration(reinterpret_cast<const uint8_t*>(address + stride));
        return length;
    }
    Tile& used = tile(first);
    if (prefix == 3) memset(used.at, 0, sizeof used.at);
    for (int row = 0; row < used.rows; ++row) {
        uint8_t* memory = reinterpret_cast<uint8_t*>(address + uint64_t(row) * stride);
        if (prefix == 3) memcpy(used.at[row], memory, size_t(used.bytes));       // TILELOADD
        else if (prefix == 2) memcpy(memory, used.at[row], size_t(used.bytes));  // TILESTORED
        else return 0;
    }
    return length;
}

void on_illegal(int, siginfo_t*, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const int length = execute(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
    if (length == 0) fail("an illegal instruction that is not AMX's");
    registers[REG_RIP] += length;
}

__attribute__((constructor)) void install() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// Linux without AMX does not know the permission that the kernels ask for.
extern "C" long syscall(long number, ...) {
    using Function = long (*)(long, ...);
    static const Function real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "syscall"));
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (long& each : a) each = va_arg(rest, long);
    va_end(rest);
    const long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    return number == SYS_arch_prctl && a[0] == 0x1023 ? 0 : result;
}
