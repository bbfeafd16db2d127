// Layer normalisation (Ba et al. 2016) of rows, forward and backward.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

#include <math.h>

#include "kernels/vector_loops.h"

namespace {

/// Sum of value(i, some) over a row. Four sums at once hide the latency of the additions.
template <class Value>
inline float row_sum(int n, Value value) {
    Vec sums[4] = {set(0.0F), set(0.0F), set(0.0F), set(0.0F)};
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int s = 0; s < 4; ++s) sums[s] = sums[s] + value(i + s * kLanes, Whole{});
    for (; i + kLanes <= n; i += kLanes) sums[0] = sums[0] + value(i, Whole{});
    if (i < n) {
        // The lanes behind the row's end may hold anything.
        float lanes[kLanes];
        store(lanes, value(i, Part{n - i}));
        for (int lane = n - i; lane < kLanes; ++lane) lanes[lane] = 0.0F;
        sums[1] = sums[1] + load(lanes);
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void layer_norm_forward(const float* x, int n_rows, int n_cols, const float* weight, const float* bias,
                        float eps, float* out, float* mean, float* rstd) {
    const float n = static_cast<float>(n_cols);
    for (int row = 0; row < n_rows; ++row, x += n_cols, out += n_cols) {
        // The row stays in L1, so the variance takes a pass of its own around the mean: squares of large
        // values would cancel.
        const float m = row_sum(n_cols, [&](int i, auto some) { return some.read(x + i); }) / n;
        const float variance = row_sum(n_cols,
                                       [&](int i, auto some) {
                                           const Vec d = some.read(x + i) - set(m);
                                           return d * d;
                                       }) /
                               n;
        const float r = 1.0F / sqrtf(variance + eps);
        for_vectors(n_cols, [&](ptrdiff_t i, auto some) {
            const Vec normal = (some.read(x + i) - set(m)) * set(r) * some.read(weight + i);
            some.write(out + i, bias == nullptr ? normal : normal + some.read(bias + i));
        });
        mean[row] = m;
        rstd[row] = r;
    }
}

void layer_norm_backward(const float* dout, const float* x, int n_rows, int n_cols, const float* weight,
                         const float* mean, const float* rstd, float* dx, bool add_to_dx, float* dweight,
                         float* dbias) {
    const float n = static_cast<float>(n_cols);
    for (int row = 0; row < n_rows; ++row, x += n_cols, dout += n_cols, dx += n_cols) {
        const Vec m = set(mean[row]);
        const Vec r = set(rstd[row]);
        // out = normal * weight + bias, so d = dout * weight is the gradient of normal = (x - mean) * rstd,
        // and dx = (d - mean(d) - normal * mean(d * normal)) * rstd.
        const float d_mean =
            row_sum(n_cols, [&](int i, auto some) { return some.read(dout + i) * some.read(weight + i); }) /
            n;
        const float d_normal_mean = row_sum(n_cols,
                                            [&](int i, auto some) {
                                                const Vec gradient = some.read(dout + i);
                                                const Vec normal = (some.read(x + i) - m) * r;
                                                return gradient * some.read(weight + i) * normal;
                                            }) /
                                    n;
        for_vectors(n_cols, [&](ptrdiff_t i, auto some) {
            const Vec normal = (some.read(x + i) - m) * r;
            const Vec gradient = some.read(dout + i);
            some.write(dweight + i, fma(gradient, normal, some.read(dweight + i)));
            if (dbias != nullptr) some.write(dbias + i, some.read(dbias + i) + gradient);
            Vec result = (gradient * some.read(weight + i) - set(d_mean) - normal * set(d_normal_mean)) * r;
            if (add_to_dx) result = result + some.read(dx + i);
            some.write(dx + i, result);
        });
    }
}

}  // namespace
