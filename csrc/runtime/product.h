// Matrix products on the thread pool, over single-threaded calls of a BLAS.
#pragma once

#include "kernels/table.h"
#include "runtime/blas.h"
#include "runtime/dispatch.h"
#include "runtime/split.h"

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

/// The product x W^T, m x n with inner length k, of one task: weights that are no float32 are converted some
/// rows at a time, into scratch.
class WeightProduct {
  public:
    WeightProduct(const Weights& weights, int k) : weights_(weights), k_(k) {
        // The BLAS packs x again for each panel, so that it should be large; L2 or a part of L3 holds it.
        constexpr int kPanel = 1 << 18;
        panel_ = std::max(16, kPanel / k / 16 * 16);
    }
    /// Floats of scratch that a task needs.
    size_t scratch_size() const { return weights_.is_float32() ? 0 : static_cast<size_t>(panel_) * k_; }

    /// out = x W^T for the n rows of weights from `first` on.
    void operator()(int m, int n, Operand x, ptrdiff_t first, Rows out, float* scratch) const {
        const int stride = static_cast<int>(out.stride);
        if (weights_.is_float32()) {
            const auto* data = static_cast<const float*>(weights_.from(first).data);
            gemm(m, n, k_, x, {data, static_cast<int>(weights_.stride), true}, 0.0F, out.data, stride);
            return;
        }
        const OpKernels& isa = *kernels().ops;
        for (int done = 0; done < n; done += panel_) {
            const int size = std::min(panel_, n - done);
            for (int row = 0; row < size; ++row)
                isa.weight_row(weights_.from(first + done + row), k_,
                               scratch + static_cast<ptrdiff_t>(row) * k_);
            gemm(m, size, k_, x, {scratch, k_, true}, 0.0F, out.data + done, stride);
        }
    }

  private:
    Weights weights_;
    int k_, panel_;
};

}  // namespace mlxgpt
