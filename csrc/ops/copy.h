// Weights out of a file's memory, turned and widened on the way.
#pragma once

#include <cstddef>

#include "kernels/table.h"

namespace mlxgpt {

/// out[i, j] = x[i, j], for rows times columns of them. x begins anywhere and its strides are in bytes, one
/// of them that of neighbours; out is contiguous, and either stored like x or float32.
struct CopyCall {
    ptrdiff_t rows, columns;
    const char* x;
    ptrdiff_t x_row, x_column;
    Storage x_storage;
    void* out;
    Storage out_storage;
};

/// Returns whether every value is finite. Each is read once and written once.
bool copy(const CopyCall& call);

}  // namespace mlxgpt
