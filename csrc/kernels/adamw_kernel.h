// A step of AdamW (Loshchilov & Hutter 2019, algorithm 2) on a part of a parameter, and the sum of squares
// for clipping by the norm.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include "kernels/table.h"
#include "kernels/vector_loops.h"

namespace {

using mlxgpt::AdamWStep;

double squares(const float* x, ptrdiff_t n) {
    // Each 4096 squares are summed in float, with full vectors, and these sums in double, so that no digits
    // are lost.
    double total = 0.0;
    for (ptrdiff_t i = 0; i < n; i += 4096) {
        const int part = static_cast<int>(n - i < 4096 ? n - i : 4096);
        total += static_cast<double>(row_sum(part, [&](int j, auto some) {
            const Vec a = some.read(x + i + j);
            return a * a;
        }));
    }
    return total;
}

void adamw(float* parameter, const float* gradient, float* m, float* v, ptrdiff_t n, float decay,
           const AdamWStep& step) {
    const Vec rate = set(step.learning_rate * step.correction1);
    for_vectors(n, [&](ptrdiff_t i, auto some) {
        const Vec g = some.read(gradient + i) * set(step.clip);
        const Vec m1 = fma(set(step.beta1), some.read(m + i), set(1.0F - step.beta1) * g);
        const Vec v1 = fma(set(step.beta2), some.read(v + i), set(1.0F - step.beta2) * g * g);
        some.write(m + i, m1);
        some.write(v + i, v1);
        const Vec root = sqrt(v1 * set(step.correction2)) + set(step.eps);
        some.write(parameter + i, some.read(parameter + i) * set(decay) - rate * m1 / root);
    });
}

}  // namespace
