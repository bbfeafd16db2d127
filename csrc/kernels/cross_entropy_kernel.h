// The cross entropy of one row of logits, and its gradient, which replaces the logits.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include <math.h>

#include "kernels/vector_loops.h"
#include "kernels/vector_math.h"

namespace {

double cross_entropy(float* logits, int V, int target, float factor) {
    Vec tops = set(-INFINITY);
    for_vectors(V, [&](ptrdiff_t i, auto some) { tops = max(tops, some.read_or(-INFINITY, logits + i)); });
    const float top = largest(tops);

    // The maximum may have skipped a NaN. It is in the sum all the same.
    const Vec shift = set(top);
    const bool gradient = factor != 0.0F;
    const float picked = logits[target];
    // Each 1024 exponentials are summed in float, these sums in double: with short vectors, a float sum of
    // 50,000 terms would lose digits.
    double total = 0;
    for (int first = 0; first < V; first += 1024) {
        float* part = logits + first;
        total += static_cast<double>(row_sum(V - first < 1024 ? V - first : 1024, [&](int i, auto some) {
            const Vec e = exp2_nonpositive((some.read(part + i) - shift) * set(kLog2E));
            if (gradient) some.write(part + i, e);
            return e;
        }));
    }
    if (gradient) {
        const Vec scale = set(static_cast<float>(factor / total));
        for_vectors(V,
                    [&](ptrdiff_t i, auto some) { some.write(logits + i, some.read(logits + i) * scale); });
        logits[target] -= factor;
    }
    return ::log(total) + (static_cast<double>(top) - static_cast<double>(picked));
}

}  // namespace
