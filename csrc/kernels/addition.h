// Additions: y += x, a bias and a residual to rows, and the sums of columns for the gradient of a bias.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include "kernels/table.h"
#include "kernels/vector_loops.h"

namespace {

using mlxgpt::Rows;

void add(const float* x, ptrdiff_t n, float* y) {
    for_vectors(n, [&](ptrdiff_t i, auto some) { some.write(y + i, some.read(y + i) + some.read(x + i)); });
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

}  // namespace
