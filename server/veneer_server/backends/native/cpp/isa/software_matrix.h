// Matrix registers simulated in memory, for tests on CPUs without any. Results are the same as
// AMX's, bit for bit (Intel's Software Developer's Manual, volume 2, TDPBF16PS and TDPBSSD).
#pragma once

#include <cstring>

namespace veneer::matrix {

constexpr char kName[] = "software-matrix";
constexpr bool kPresent = true;

inline bool permit() { return true; }

struct Register {
    Shape shape;
    alignas(64) uint8_t bytes[16][64];
};

inline Register& at(int index) {
    static thread_local Register registers[kRegisters];
    return registers[index];
}

inline void configure(const Shape (&shapes)[kRegisters]) {
    for (int i = 0; i < kRegisters; ++i) {
        at(i).shape = shapes[i];
        std::memset(at(i).bytes, 0, sizeof at(i).bytes);
    }
}
inline void release() {
    constexpr Shape none[kRegisters] = {};
    configure(none);
}

template <int R>
inline void zero() {
    std::memset(at(R).bytes, 0, sizeof at(R).bytes);
}
template <int R>
inline void load(const void* from, size_t stride) {
    zero<R>();
    for (int row = 0; row < at(R).shape.rows; ++row)
        std::memcpy(at(R).bytes[row], static_cast<const char*>(from) + size_t(row) * stride,
                    size_t(at(R).shape.row_bytes));
}
template <int R>
inline void store(void* to, size_t stride) {
    for (int row = 0; row < at(R).shape.rows; ++row)
        std::memcpy(static_cast<char*>(to) + size_t(row) * stride, at(R).bytes[row],
                    size_t(at(R).shape.row_bytes));
}

// The products of a row's pairs are summed from zero, those of the pairs' first numbers separately
// from those of the second ones. Then the two sums are added, and the result is added to the row's
// old numbers.
template <int Sums, int A, int B>
inline void dot() {
    const FlushDenormals flush;
    const Register &a = at(A), &b = at(B);
    Register& sums = at(Sums);
    const int pairs = a.shape.row_bytes / 4, columns = sums.shape.row_bytes / 4;
    for (int row = 0; row < sums.shape.rows; ++row) {
        float first[16] = {}, second[16] = {};
        for (int pair = 0; pair < pairs; ++pair) {
            bf16 x[2], w[32];
            std::memcpy(x, a.bytes[row] + 4 * pair, sizeof x);
            std::memcpy(w, b.bytes[pair], sizeof w);
            for (int n = 0; n < columns; ++n) {
                first[n] = __builtin_fmaf(to_float(x[0]), to_float(w[2 * n]), first[n]);
                second[n] = __builtin_fmaf(to_float(x[1]), to_float(w[2 * n + 1]), second[n]);
            }
        }
        float all[16];
        std::memcpy(all, sums.bytes[row], sizeof all);
        for (int n = 0; n < columns; ++n) all[n] += first[n] + second[n];
        std::memcpy(sums.bytes[row], all, sizeof all);
    }
}

template <int Sums, int A, int B>
inline void dot_int8() {
    const Register &a = at(A), &b = at(B);
    Register& sums = at(Sums);
    const int fours = a.shape.row_bytes / 4, columns = sums.shape.row_bytes / 4;
    for (int row = 0; row < sums.shape.rows; ++row) {
        for (int n = 0; n < columns; ++n) {
            int32_t sum;
            std::memcpy(&sum, sums.bytes[row] + 4 * n, sizeof sum);
            for (int k = 0; k < fours; ++k)
                for (int i = 0; i < 4; ++i)
                    sum += int8_t(a.bytes[row][4 * k + i]) * int8_t(b.bytes[k][4 * n + i]);
            std::memcpy(sums.bytes[row] + 4 * n, &sum, sizeof sum);
        }
    }
}

}  // namespace veneer::matrix
