// The matrix products of a linear layer on the thread pool: each task computes a block of the result by a
// single-threaded call of the BLAS.
#pragma once

#include "kernels/table.h"
#include "runtime/blas.h"
#include "runtime/dispatch.h"
#include "runtime/split.h"

namespace mlxgpt {

/// a as an operand, and its transpose.
inline Operand plain(Rows a) { return {a.data, static_cast<int>(a.stride)}; }
inline Operand transposed(Rows a) { return {a.data, static_cast<int>(a.stride), true}; }

/// The block of a that begins at (row, column).
inline Rows block_at(Rows a, ptrdiff_t row, ptrdiff_t column) {
    return {a.data + row * a.stride + column, a.stride};
}

/// The blocks of an (m, n) result with inner length k, one for each task.
///
/// OpenBLAS has threads of its own, but they spin for a while after each product, and so long they keep a
/// core from our pool and from other programs: on two shared Zen 3 cores (768 x 512 x 128) its two threads
/// made 13 GFLOP/s, tasks of ours 62, one thread alone 68. With our tasks, a block's bias or activation is
/// also computed while the block is in the cache.
class Blocks {
  public:
    Blocks(int m, int n, int k) : m_(m), n_(n) {
        constexpr double kProductsPerTask = 2e6;  // about 50 us
        const int n_parts = n_tasks(static_cast<double>(m) * n * k, kProductsPerTask);
        // A BLAS call first packs its k x columns and rows x k operands: take the split that packs least.
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

    // Blocks end at multiples of 16, which a register block divides on any processor. A block may be empty.
    Range rows(int index) const { return part_of(m_, index / column_parts_, row_parts_, 16); }
    Range columns(int index) const { return part_of(n_, index % column_parts_, column_parts_, 16); }

  private:
    int m_, n_, row_parts_ = 1, column_parts_ = 1;
};

/// Blocks of x W^T with inner length k. Weights that are not float32 are converted into scratch, a panel of
/// rows at a time.
class WeightProduct {
  public:
    WeightProduct(const Weights& weights, int k) : weights_(weights), k_(k) {
        // The BLAS packs x again for each panel, so a panel should be large; 1 MB fits L2 or a part of L3.
        constexpr int kPanel = 1 << 18;
        panel_ = std::max(16, kPanel / k / 16 * 16);
    }
    /// Floats of scratch that a task needs.
    size_t scratch_size() const { return weights_.is_float32() ? 0 : static_cast<size_t>(panel_) * k_; }

    /// Writes the block `rows`, `columns` of the result to `out`, the block's own memory.
    void operator()(Range rows, Range columns, Rows x, Rows out, float* scratch) const {
        const int m = static_cast<int>(rows.size), n = static_cast<int>(columns.size);
        const int stride = static_cast<int>(out.stride);
        const Operand a = plain(x.from(rows.begin));
        if (weights_.is_float32()) {
            const auto* data = static_cast<const float*>(weights_.from(columns.begin).data);
            gemm(m, n, k_, a, {data, static_cast<int>(weights_.stride), true}, 0.0F, out.data, stride);
            return;
        }
        const Kernels& isa = kernels();
        for (int done = 0; done < n; done += panel_) {
            const int size = std::min(panel_, n - done);
            for (int row = 0; row < size; ++row)
                isa.weight_row(weights_.from(columns.begin + done + row), k_,
                               scratch + static_cast<ptrdiff_t>(row) * k_);
            gemm(m, size, k_, a, {scratch, k_, true}, 0.0F, out.data + done, stride);
        }
    }

  private:
    Weights weights_;
    int k_, panel_;
};

/// A block of dx = dout W, where W has n_out rows.
inline void input_gradient(Rows dout, Operand weight, int n_out, Range rows, Range columns, Rows dx) {
    if (rows.size == 0 || columns.size == 0) return;
    gemm(static_cast<int>(rows.size), static_cast<int>(columns.size), n_out, plain(dout.from(rows.begin)),
         {weight.data + columns.begin, weight.stride}, 0.0F, block_at(dx, rows.begin, columns.begin).data,
         static_cast<int>(dx.stride));
}

/// A block of dweight = dout^T x, or of dweight += dout^T x, over n_rows rows of dout and x.
inline void weight_gradient(Rows dout, Rows x, int n_rows, Range rows, Range columns, bool add,
                            Rows dweight) {
    if (rows.size == 0 || columns.size == 0) return;
    gemm(static_cast<int>(rows.size), static_cast<int>(columns.size), n_rows,
         transposed(block_at(dout, 0, rows.begin)), plain(block_at(x, 0, columns.begin)), add ? 1.0F : 0.0F,
         block_at(dweight, rows.begin, columns.begin).data, static_cast<int>(dweight.stride));
}

}  // namespace mlxgpt
