// Up to 32 rows times 32 columns on matrix registers.
#pragma once

#include <algorithm>

#include "shared.h"

namespace veneer {

constexpr int kMatrixRows = 2 * matrix::kRows;

inline int divide_up(int count, int by) { return (count + by - 1) / by; }

// Registers for up to 32 rows of A and 32 columns of B. 0 to 3: sums; 4 and 5: the upper 16 rows of
// A and the lower ones; 6 and 7: the left 16 columns of B and the right ones.
class SquareRegisters {
  public:
    explicit SquareRegisters(int rows)
        : lower_(rows > matrix::kRows), registers_(shapes(rows).all) {}

    void zero() const {
        matrix::zero<0>(), matrix::zero<1>();
        if (lower_) matrix::zero<2>(), matrix::zero<3>();
    }

    // sums += a [rows, 32] b; each of b's halves is [16 pairs][16 columns][2].
    void add(const bf16* a, size_t a_stride, const bf16* left, const bf16* right) const {
        constexpr size_t line = 2 * kLanes * sizeof(bf16);
        const size_t stride = a_stride * sizeof(bf16);
        matrix::load<6>(left, line);
        matrix::load<7>(right, line);
        matrix::load<4>(a, stride);
        matrix::dot<0, 4, 6>(), matrix::dot<1, 4, 7>();
        if (!lower_) return;
        matrix::load<5>(a + matrix::kRows * a_stride, stride);
        matrix::dot<2, 5, 6>(), matrix::dot<3, 5, 7>();
    }

    // to [rows][32]
    void store(float* to) const {
        constexpr size_t line = 2 * kLanes * sizeof(float);
        matrix::store<0>(to, line), matrix::store<1>(to + kLanes, line);
        if (!lower_) return;
        to += matrix::kRows * 2 * kLanes;
        matrix::store<2>(to, line), matrix::store<3>(to + kLanes, line);
    }

  private:
    struct Shapes {
        matrix::Shape all[matrix::kRegisters];
    };
    static Shapes shapes(int rows) {
        const matrix::Shape upper{std::min(rows, matrix::kRows)}, lower{rows - upper.rows};
        const matrix::Shape b{matrix::kRows};
        return {{upper, upper, lower, lower, upper, lower, b, b}};
    }

    bool lower_;
    matrix::Registers registers_;
};

}  // namespace veneer
