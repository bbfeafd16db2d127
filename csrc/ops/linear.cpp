#include "ops/linear.h"

#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "runtime/product.h"
#include "runtime/scratch.h"

namespace mlxgpt {
namespace {

Rows block_of(Rows a, Range rows, Range columns) {
    return a.data == nullptr ? Rows{} : block_at(a, rows.begin, columns.begin);
}

int as_int(ptrdiff_t n) { return static_cast<int>(n); }

// Scales a block of the product, and adds bias and residual or applies the activation, while the block is in
// the cache.
void finish(const LinearForward& call, Range rows, Range columns) {
    const Kernels& isa = kernels();
    const int m = as_int(rows.size), n = as_int(columns.size);
    const Rows out = block_of(call.out, rows, columns);
    if (call.scale != 1.0F)  // an adapter's few columns, not worth a kernel
        for (int row = 0; row < m; ++row)
            for (int i = 0; i < n; ++i) out.data[row * out.stride + i] *= call.scale;
    const float* bias = call.bias == nullptr ? nullptr : call.bias + columns.begin;
    if (call.activated.data != nullptr)
        call.activation->forward(out, m, n, bias, block_of(call.activated, rows, columns));
    else if (bias != nullptr || call.residual.data != nullptr)
        isa.add_bias(out, m, n, bias, block_of(call.residual, rows, columns));
}

// Each task multiplies all rows of x by some of the weights.
void few_rows(const LinearForward& call) {
    const Kernels& isa = kernels();
    const size_t quantized = isa.quantized_row(call.weight, call.n_in);
    const size_t own = isa.few_rows_scratch(call.weight, call.n_in);
    float* const buffer = scratch(quantized * call.rows + own * num_threads());
    Rows x = call.x;
    if (quantized > 0) {
        x = {buffer + own * num_threads(), static_cast<ptrdiff_t>(quantized)};
        for (int row = 0; row < call.rows; ++row)
            isa.quantize(call.x.from(row).data, call.weight, call.n_in, x.from(row).data);
    }
    constexpr double kBytesPerTask = 1 << 19, kProductsPerTask = 2e6;  // about 50 us
    const double products = static_cast<double>(call.rows) * call.n_in * call.n_out;
    const double work =
        call.weight.bytes(call.n_out, call.n_in) / kBytesPerTask + products / kProductsPerTask;
    const int n_parts = n_tasks(work, 1.0);
    parallel_for(n_parts, [&](int task, int worker) {
        const Range rows{0, call.rows}, columns = part_of(call.n_out, task, n_parts, 16);
        if (columns.size == 0) return;
        isa.few_rows(x, call.rows, call.weight.from(columns.begin), as_int(columns.size), call.n_in,
                     block_of(call.out, rows, columns), buffer + own * worker);
        finish(call, rows, columns);
    });
}

}  // namespace

void linear_forward(const LinearForward& call) {
    if (call.rows <= kFewRows) return few_rows(call);
    const Blocks blocks(call.rows, call.n_out, call.n_in);
    const WeightProduct product(call.weight, call.n_in);
    float* const buffer = scratch(product.scratch_size() * num_threads());
    parallel_for(blocks.size(), [&](int task, int worker) {
        const Range rows = blocks.rows(task), columns = blocks.columns(task);
        if (rows.size == 0 || columns.size == 0) return;
        product(rows, columns, call.x, block_of(call.out, rows, columns),
                buffer + product.scratch_size() * worker);
        finish(call, rows, columns);
    });
}

void linear_backward(const LinearBackward& call) {
    const Kernels& isa = kernels();
    const Blocks dx(call.rows, call.n_in, call.n_out), dweight(call.n_out, call.n_in, call.rows);
    const int n_dx = call.dx.data == nullptr ? 0 : dx.size();
    const int n_dweight = call.dweight.data == nullptr ? 0 : dweight.size();
    const int n_dbias =
        call.dbias == nullptr ? 0 : n_tasks(static_cast<double>(call.rows) * call.n_out, kElementsPerTask);
    parallel_for(n_dx + n_dweight + n_dbias, [&](int task, int) {
        if (task < n_dx) {
            const Range rows = dx.rows(task), columns = dx.columns(task);
            input_gradient(call.dout, plain(call.weight), call.n_out, rows, columns, call.dx);
            if (call.pre.data != nullptr)
                call.activation->backward(block_of(call.pre, rows, columns), as_int(rows.size),
                                          as_int(columns.size), block_of(call.dx, rows, columns),
                                          block_of(call.activated, rows, columns));
        } else if (task < n_dx + n_dweight) {
            weight_gradient(call.dout, call.x, call.rows, dweight.rows(task - n_dx),
                            dweight.columns(task - n_dx), call.accumulate, call.dweight);
        } else {
            const Range columns = part_of(call.n_out, task - n_dx - n_dweight, n_dbias, 16);
            float* sums = call.dbias + columns.begin;
            if (!call.accumulate) std::fill_n(sums, columns.size, 0.0F);
            isa.add_columns(block_at(call.dout, 0, columns.begin), call.rows, as_int(columns.size), sums);
        }
    });
}

}  // namespace mlxgpt
