// Matrix products on the thread pool, over single-threaded calls of a BLAS.
#pragma once

#include "blas.h"
#include "kernels/table.h"
#include "split.h"

namespace mlxgpt {

inline Operand rows_of(Rows a, ptrdiff_t first = 0) {
    return {a.data + first * a.stride, static_cast<int>(a.stride)};
}
inline Operand columns_of(Rows a, ptrdiff_t first = 0) {
    return {a.data + first, static_cast<int>(a.stride), true};
}

/// The blocks of an m x n output with inner length k, one to a task.
///
/// Each task calls the BLAS for its block. OpenBLAS has threads of its own, but they spin for a while after
/// each product, and for as long they keep a core from our pool and from other programs: on two shared
/// Zen 3 cores (768 x 512 x 128) its two threads made 13 GFLOP/s, tasks of ours 62, one thread alone 68.
/// And a block's bias or GELU is added while the block is still in the cache.
class Blocks {
  public:
    Blocks(int m, int n, int k) : m_(m), n_(n) {
        constexpr double kProductsPerTask = 2e6;  // 50 us or so
        const int n_parts = n_tasks(static_cast<double>(m) * n * k, kProductsPerTask);
        // A call packs its k x columns and rows x k operands first: the fewest elements to pack.
        double least = 0;
        for (int rows = 1; rows <= n_parts; ++rows) {
            if (n_parts % rows != 0) continue;
            const int columns = n_parts / rows;
            const double packed = static_cast<double>(rows) * n + static_cast<double>(columns) * m;
            if (rows == 1 || packed < least) {
                least = packed;
                row_parts_ = rows;
                column_parts_ = columns;
            }
        }
    }
    int size() const { return row_parts_ * column_parts_; }
    // Multiples of what a register block holds on any processor.
    Range rows(int index) const { return part_of(m_, index / column_parts_, row_parts_, 16); }
    Range columns(int index) const { return part_of(n_, index % column_parts_, column_parts_, 16); }

  private:
    int m_, n_, row_parts_ = 1, column_parts_ = 1;
};

}  // namespace mlxgpt
