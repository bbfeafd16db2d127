// Layer normalisation (Ba et al. 2016) of rows, forward and backward.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include <math.h>

#include "kernels/vector_loops.h"

namespace {

void layer_norm_forward(const float* x, int n_rows, int n_cols, const float* weight, const float* bias,
                        float eps, float* out, float* mean, float* rstd) {
    const float n = static_cast<float>(n_cols);
    for (int row = 0; row < n_rows; ++row, x += n_cols, out += n_cols) {
        // The variance takes a second pass, over the differences from the mean, as the mean of squares minus
        // the square of the mean would cancel for large values. The row is still in L1.
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
