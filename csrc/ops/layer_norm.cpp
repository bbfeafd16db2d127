#include "ops/layer_norm.h"

#include <algorithm>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "runtime/scratch.h"
#include "runtime/split.h"

namespace mlxgpt {

void layer_norm_forward(int rows, int n, const float* x, const float* weight, const float* bias, float eps,
                        float* out, float* mean, float* rstd) {
    const Kernels& isa = kernels();
    parallel_rows(rows, n, [&](Range part) {
        isa.layer_norm_forward(x + part.begin * n, static_cast<int>(part.size), n, weight, bias, eps,
                               out + part.begin * n, mean + part.begin, rstd + part.begin);
    });
}

void layer_norm_backward(const LayerNormBackward& call) {
    const Kernels& isa = kernels();
    const int n = call.n;
    const int n_parts = n_tasks(static_cast<double>(call.rows) * n, kElementsPerTask);
    // Each task sums dweight and dbias over its rows; these sums are then added up in order of the tasks.
    const ptrdiff_t stride = (2 * static_cast<ptrdiff_t>(n) + 15) / 16 * 16;
    float* sums = scratch(static_cast<size_t>(stride) * n_parts);
    std::fill_n(sums, stride * n_parts, 0.0F);
    parallel_for(n_parts, [&](int task, int) {
        const Range part = part_of(call.rows, task, n_parts);
        float* own = sums + task * stride;
        isa.layer_norm_backward(call.dout + part.begin * n, call.x + part.begin * n,
                                static_cast<int>(part.size), n, call.weight, call.mean + part.begin,
                                call.rstd + part.begin, call.dx + part.begin * n, call.add_to_dx, own,
                                call.dbias == nullptr ? nullptr : own + n);
    });
    for (float* to : {call.dweight, call.dbias}) {
        if (to == nullptr) continue;
        if (!call.accumulate) std::fill_n(to, n, 0.0F);
        for (int part = 0; part < n_parts; ++part)
            isa.add(sums + part * stride + (to == call.dweight ? 0 : n), n, to);
    }
}

}  // namespace mlxgpt
