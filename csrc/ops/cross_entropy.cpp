#include "ops/cross_entropy.h"

#include <algorithm>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "runtime/product.h"
#include "runtime/scratch.h"

namespace mlxgpt {
namespace {

// The most logits at a time: 104 MB, 512 rows of GPT-2's vocabulary. Every chunk of rows reads the whole
// weight (and its gradient), so that chunks of few rows would wait for memory: whatever the vocabulary, a
// chunk has kLeastRows rows.
constexpr ptrdiff_t kMostLogits = 26 << 20;
constexpr int kLeastRows = 64;

// Writes the loss of each row of logits, 0 if it does not count. With `gradient`, replaces the logits by
// factor times their gradient.
void losses_of(int n, int V, Rows logits, const int32_t* targets, bool gradient, float factor,
               double* losses) {
    const Kernels& isa = kernels();
    parallel_rows(n, V, [&](Range part) {
        for (ptrdiff_t row = part.begin; row < part.begin + part.size; ++row) {
            float* own = logits.from(row).data;
            const bool counts = targets[row] >= 0;
            losses[row] = counts ? isa.cross_entropy(own, V, targets[row], factor) : 0.0;
            // The kernel computes no gradient if the factor is 0.
            if (gradient && (!counts || factor == 0.0F)) std::fill_n(own, V, 0.0F);
        }
    });
}

// dx and dweight of one chunk, from the gradients of its logits.
void write_gradients(const LinearCrossEntropy& call, Rows dlogits, int first, int n) {
    const Blocks dx(n, call.C, call.V), dweight(call.V, call.C, n);
    const int n_dx = call.dx.data == nullptr ? 0 : dx.size();
    const int n_dweight = call.dweight.data == nullptr ? 0 : dweight.size();
    const Operand weight{static_cast<const float*>(call.weight.data), static_cast<int>(call.weight.stride)};
    parallel_for(n_dx + n_dweight, [&](int task, int) {
        if (task < n_dx)
            input_gradient(dlogits, weight, call.V, dx.rows(task), dx.columns(task), call.dx.from(first));
        else
            weight_gradient(dlogits, call.x.from(first), n, dweight.rows(task - n_dx),
                            dweight.columns(task - n_dx), first > 0 || call.accumulate, call.dweight);
    });
}

}  // namespace

int cross_entropy_rows(int n_rows, int vocab_size) {
    const int fitting = static_cast<int>(kMostLogits / vocab_size) / 16 * 16;
    return std::min(n_rows, std::max(kLeastRows, fitting));
}

double linear_cross_entropy(const LinearCrossEntropy& call) {
    const auto counted =
        std::count_if(call.targets, call.targets + call.N, [](int32_t target) { return target >= 0; });
    const double divisor = static_cast<double>(std::max<ptrdiff_t>(1, counted));
    const bool gradient = call.dx.data != nullptr || call.dweight.data != nullptr;
    const float factor = gradient ? call.scale / static_cast<float>(divisor) : 0.0F;
    const int chunk = cross_entropy_rows(call.N, call.V);
    const WeightProduct product(call.weight, call.C);
    const size_t own = product.scratch_size();
    float* const buffer = scratch(own * num_threads() + static_cast<size_t>(chunk) * call.V);
    const Rows logits{buffer + own * num_threads(), call.V};
    std::vector<double> losses(call.N);
    for (int first = 0; first < call.N; first += chunk) {
        const int n = std::min(chunk, call.N - first);
        const Blocks blocks(n, call.V, call.C);
        parallel_for(blocks.size(), [&](int task, int worker) {
            const Range rows = blocks.rows(task), columns = blocks.columns(task);
            if (rows.size == 0 || columns.size == 0) return;
            product(rows, columns, call.x.from(first), block_at(logits, rows.begin, columns.begin),
                    buffer + own * worker);
        });
        losses_of(n, call.V, logits, call.targets + first, gradient, factor, losses.data() + first);
        if (gradient) write_gradients(call, logits, first, n);
    }
    double total = 0;
    for (const double loss : losses) total += loss;
    return total / divisor;
}

}  // namespace mlxgpt
