// Copies of weights out of a mapped file, transposed and converted to float32 if need be.
#pragma once

#include <cstddef>

#include "kernels/table.h"

namespace mlxgpt {

/// out[i, j] = x[i, j] for (rows, columns) elements. x may begin at any address; its strides are in bytes,
/// and along one axis its elements are adjacent. out is contiguous, and stored as x is or as float32.
struct CopyCall {
    ptrdiff_t rows, columns;
    const char* x;
    ptrdiff_t x_row, x_column;
    Storage x_storage;
    void* out;
    Storage out_storage;
};

/// Copies, and returns whether every value is finite.
bool copy(const CopyCall& call);

}  // namespace mlxgpt
