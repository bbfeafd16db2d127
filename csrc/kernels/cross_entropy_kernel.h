// Cross entropy of one row of logits, and its gradient in their place.
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

    // A NaN that the maximum passed over comes back in the sum.
    const Vec shift = set(top);
    const bool gradient = factor != 0.0F;
    const float picked = logits[target];
    double total = 0;  // of sums of 1024: a float sum of 50,000 would lose digits where vectors are short
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
