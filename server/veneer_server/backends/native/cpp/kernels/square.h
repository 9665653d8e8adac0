// Multiplies up to 16 rows by 32 columns, over 64 inputs, on matrix registers.
#pragma once

#include <algorithm>

#include "shared.h"

namespace veneer {

constexpr int kMatrixRows = matrix::kRows;
constexpr int kMatrixInputs = 64;

inline int divide_up(int count, int by) { return (count + by - 1) / by; }

// The registers for up to 16 rows of A, and for a B of 64 inputs and 32 columns. 0 and 1: sums; 2
// and 3: the halves of A's inputs; 4 to 7: B's left columns and right ones for the first half of
// the inputs, then for the second half. Each operand has its own register, since CPUs do not rename
// these: loading a register waits for the previous multiply that uses it.
class SquareRegisters {
  public:
    explicit SquareRegisters(int rows) { matrix::set_up(shapes(rows).all); }

    void zero() const { matrix::zero<0>(), matrix::zero<1>(); }

    // sums += a [rows, 64] B. Loads B: `left` and `right` are each 32 lines of pairs for 16
    // columns.
    void add(const bf16* a, size_t a_stride, const bf16* left, const bf16* right,
             size_t b_stride) const {
        const size_t line = b_stride * sizeof(bf16), half = matrix::kRows * b_stride;
        const size_t stride = a_stride * sizeof(bf16);
        matrix::load<4>(left, line), matrix::load<5>(right, line);
        matrix::load<2>(a, stride);
        matrix::dot<0, 2, 4>(), matrix::dot<1, 2, 5>();
        matrix::load<6>(left + half, line), matrix::load<7>(right + half, line);
        matrix::load<3>(a + kMatrixInputs / 2, stride);
        matrix::dot<0, 3, 6>(), matrix::dot<1, 3, 7>();
    }

    // The same for a B that is loaded by quarters (see `Quarters`): left columns and right ones for
    // the first half of the inputs, then for the second half.
    template <class Quarters>
    void add_quarters(const bf16* a, size_t a_stride, Quarters& quarters) const {
        constexpr size_t line = 2 * kLanes * sizeof(bf16);
        const size_t stride = a_stride * sizeof(bf16);
        matrix::load<4>(quarters.template next<0>(), line), matrix::load<2>(a, stride);
        matrix::dot<0, 2, 4>();
        matrix::load<5>(quarters.template next<1>(), line);
        matrix::dot<1, 2, 5>();
        matrix::load<6>(quarters.template next<2>(), line);
        matrix::load<3>(a + kMatrixInputs / 2, stride);
        matrix::dot<0, 3, 6>();
        matrix::load<7>(quarters.template next<3>(), line);
        matrix::dot<1, 3, 7>();
    }

    // The same for a B of 16 columns. The sums of the right columns do not change.
    void add(const bf16* a, size_t a_stride, const bf16* left, size_t b_stride) const {
        const size_t line = b_stride * sizeof(bf16), half = matrix::kRows * b_stride;
        const size_t stride = a_stride * sizeof(bf16);
        matrix::load<4>(left, line), matrix::load<2>(a, stride);
        matrix::dot<0, 2, 4>();
        matrix::load<6>(left + half, line), matrix::load<3>(a + kMatrixInputs / 2, stride);
        matrix::dot<0, 3, 6>();
    }

    // sums += a [rows, 64] times the B that was loaded last.
    void add(const bf16* a, size_t a_stride) const {
        const size_t stride = a_stride * sizeof(bf16);
        matrix::load<2>(a, stride), matrix::load<3>(a + kMatrixInputs / 2, stride);
        matrix::dot<0, 2, 4>(), matrix::dot<1, 2, 5>();
        matrix::dot<0, 3, 6>(), matrix::dot<1, 3, 7>();
    }

    // Store the sums to `to` [rows][32].
    void store(float* to) const {
        constexpr size_t line = 2 * kLanes * sizeof(float);
        matrix::store<0>(to, line), matrix::store<1>(to + kLanes, line);
    }

  private:
    struct Shapes {
        matrix::Shape all[matrix::kRegisters];
    };
    static Shapes shapes(int rows) {
        const matrix::Shape a{rows}, b{matrix::kRows};
        return {{a, a, a, a, b, b, b, b}};
    }
};

}  // namespace veneer
