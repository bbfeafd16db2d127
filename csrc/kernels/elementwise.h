// Sums of arrays, row by row: biases, residuals, and the gradients that flow into both.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

#include "kernels/philox.h"
#include "kernels/vector_loops.h"

namespace {

using mlxgpt::Rows;

void add(const float* x, ptrdiff_t n, float* y) {
    for_vectors(n, [&](ptrdiff_t i, auto some) { some.write(y + i, some.read(y + i) + some.read(x + i)); });
}

void scale(float factor, ptrdiff_t n, float* y) {
    for_vectors(n, [&](ptrdiff_t i, auto some) { some.write(y + i, some.read(y + i) * set(factor)); });
}

void add_bias(Rows x, int n_rows, int n_cols, const float* bias, Rows residual) {
    for (int i = 0; i < n_rows; ++i) {
        float* row = x.data + i * x.stride;
        const float* other = residual.data == nullptr ? nullptr : residual.data + i * residual.stride;
        for_vectors(n_cols, [&](ptrdiff_t c, auto some) {
            Vec a = some.read(row + c);
            if (bias != nullptr) a = a + some.read(bias + c);
            if (other != nullptr) a = a + some.read(other + c);
            some.write(row + c, a);
        });
    }
}

void add_columns(Rows x, int n_rows, int n_cols, float* sums) {
    // Columns in the order of memory: a block of 16 vectors stays in L1 while the rows pass by.
    constexpr int kColumns = 16 * kLanes;
    for (int c0 = 0; c0 < n_cols; c0 += kColumns) {
        const int n = n_cols - c0 < kColumns ? n_cols - c0 : kColumns;
        for (int i = 0; i < n_rows; ++i) add(x.data + i * x.stride + c0, n, sums + c0);
    }
}

/// Element i belongs to word (i % 64) / 16 of counter i / 64 * 16 + i % 16, so that 4, 8 or 16 lanes of
/// counters side by side give elements side by side, and every instruction set the same mask.
void dropout(const float* x, const float* residual, uint64_t first, ptrdiff_t n, float p, uint64_t seed,
             float* out) {
    const DropoutFactors factors(p);
    x += first;
    out += first;
    if (residual != nullptr) residual += first;
    for (ptrdiff_t i0 = 0; i0 < n; i0 += 64) {
        const uint64_t block = (first + static_cast<uint64_t>(i0)) / 64;
        for (int lane = 0; lane < 16; lane += kLanes) {
            const UVec low =
                lane_numbers_u() + set_u(static_cast<uint32_t>(block * 16) + static_cast<uint32_t>(lane));
            const Random4 random =
                philox(low, set_u(static_cast<uint32_t>(block >> 28)), set_u(0), set_u(0), seed);
            for (int word = 0; word < 4; ++word) {
                const Vec mask = factors(random.word[word]);
                const ptrdiff_t i = i0 + word * 16 + lane;
                const auto element = [&](auto some) {
                    const Vec a = some.read(x + i) * mask;
                    some.write(out + i, residual == nullptr ? a : a + some.read(residual + i));
                };
                if (i + kLanes <= n)
                    element(Whole{});
                else if (i < n)
                    element(Part{static_cast<int>(n - i)});
            }
        }
    }
}

}  // namespace
