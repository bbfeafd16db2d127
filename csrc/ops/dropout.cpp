#include "ops/dropout.h"

#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "runtime/split.h"

namespace mlxgpt {

void dropout(ptrdiff_t n, const float* x, const float* residual, float p, uint64_t seed, float* out) {
    const Kernels& isa = kernels();
    const int n_parts = n_tasks(static_cast<double>(n), kElementsPerTask);
    parallel_for(n_parts, [&](int task, int) {
        const Range part = part_of(n, task, n_parts, 64);
        isa.dropout(x, residual, static_cast<uint64_t>(part.begin), part.size, p, seed, out);
    });
}

}  // namespace mlxgpt
