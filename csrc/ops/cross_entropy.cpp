#include "ops/cross_entropy.h"

#include <algorithm>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "runtime/product.h"
#include "runtime/scratch.h"

namespace mlxgpt {
namespace {

// Logits held at once. Every chunk of rows reads all of the weight (and its gradient), so that chunks of
// few rows wait for memory; the logits of 512 rows of GPT-2's vocabulary are 103 MB.
constexpr ptrdiff_t kLogits = 26 << 20;
constexpr int kLeastRows = 64;

int count(const int32_t* targets, int n) {
    return static_cast<int>(std::count_if(targets, targets + n, [](int32_t target) { return target >= 0; }));
}

// Writes the losses of rows of logits, and in the place of the logits factor times their gradient if wanted.
void rows_of_loss(int n, int V, Rows logits, const int32_t* targets, bool gradient, float factor,
                  double* losses) {
    const OpKernels& isa = *kernels().ops;
    const int n_parts = n_tasks(static_cast<double>(n) * V, kElementsPerTask);
    parallel_for(n_parts, [&](int task, int) {
        const Range part = part_of(n, task, n_parts);
        for (ptrdiff_t row = part.begin; row < part.begin + part.size; ++row) {
            float* own = logits.data + row * logits.stride;
            const bool counted = targets[row] >= 0;
            losses[row] = counted ? isa.cross_entropy(own, V, targets[row], factor) : 0.0;
            // To the kernel a factor of 0 means that no gradient is wanted.
            if (gradient && (!counted || factor == 0.0F)) std::fill_n(own, V, 0.0F);
        }
    });
}

double mean(const std::vector<double>& losses, int counted) {
    double total = 0;
    for (const double loss : losses) total += loss;
    return total / std::max(1, counted);
}

}  // namespace

double linear_cross_entropy(const LinearCrossEntropy& call) {
    const int counted = count(call.targets, call.N);
    const bool gradient = call.dx.data != nullptr || call.dweight.data != nullptr;
    const float factor = gradient ? call.scale / static_cast<float>(std::max(1, counted)) : 0.0F;
    const int chunk = std::min(call.N, std::max(kLeastRows, static_cast<int>(kLogits / call.V) / 16 * 16));
    const WeightProduct product(call.weight, call.C);
    const size_t own = product.scratch_size();
    float* const buffer = scratch(own * num_threads() + static_cast<size_t>(chunk) * call.V);
    const Rows logits{buffer + own * num_threads(), call.V};
    std::vector<double> losses(call.N);
    for (int first = 0; first < call.N; first += chunk) {
        const int n = std::min(chunk, call.N - first);
        const Rows x{call.x.data + first * call.x.stride, call.x.stride};
        const Blocks forward(n, call.V, call.C);
        parallel_for(forward.size(), [&](int task, int worker) {  // logits = x W^T
            const Range rows = forward.rows(task), columns = forward.columns(task);
            if (rows.size == 0 || columns.size == 0) return;
            product(static_cast<int>(rows.size), static_cast<int>(columns.size), rows_of(x, rows.begin),
                    columns.begin, {logits.data + rows.begin * call.V + columns.begin, call.V},
                    buffer + own * worker);
        });
        rows_of_loss(n, call.V, logits, call.targets + first, gradient, factor, losses.data() + first);
        if (!gradient) continue;
        const Blocks dx(n, call.C, call.V), dweight(call.V, call.C, n);
        const int n_dx = call.dx.data == nullptr ? 0 : dx.size();
        const int n_dweight = call.dweight.data == nullptr ? 0 : dweight.size();
        parallel_for(n_dx + n_dweight, [&](int task, int) {
            const bool is_dx = task < n_dx;
            const Range rows = is_dx ? dx.rows(task) : dweight.rows(task - n_dx);
            const Range columns = is_dx ? dx.columns(task) : dweight.columns(task - n_dx);
            if (rows.size == 0 || columns.size == 0) return;
            const int m = static_cast<int>(rows.size), k = static_cast<int>(columns.size);
            if (is_dx) {  // dx = dlogits W
                const auto* weight = static_cast<const float*>(call.weight.data) + columns.begin;
                gemm(m, k, call.V, rows_of(logits, rows.begin),
                     {weight, static_cast<int>(call.weight.stride)}, 0.0F,
                     call.dx.data + (first + rows.begin) * call.dx.stride + columns.begin,
                     static_cast<int>(call.dx.stride));
            } else {  // dW = dlogits^T x
                gemm(m, k, n, columns_of(logits, rows.begin), rows_of({x.data + columns.begin, x.stride}),
                     first > 0 || call.accumulate ? 1.0F : 0.0F,
                     call.dweight.data + rows.begin * call.dweight.stride + columns.begin,
                     static_cast<int>(call.dweight.stride));
            }
        });
    }
    return mean(losses, counted);
}

double cross_entropy(int N, int V, Rows logits, const int32_t* targets, Rows dlogits) {
    const int counted = count(targets, N);
    std::vector<double> losses(N);
    float factor = 0.0F;
    Rows rows = logits;
    if (dlogits.data != nullptr) {
        factor = 1.0F / static_cast<float>(std::max(1, counted));
        rows = dlogits;
        if (dlogits.data != logits.data)
            for (ptrdiff_t row = 0; row < N; ++row)
                std::copy_n(logits.data + row * logits.stride, V, dlogits.data + row * dlogits.stride);
    }
    rows_of_loss(N, V, rows, targets, dlogits.data != nullptr, factor, losses.data());
    return mean(losses, counted);
}

}  // namespace mlxgpt
