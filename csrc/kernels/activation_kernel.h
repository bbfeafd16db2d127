// GELU, x Phi(x) with Phi the normal distribution function (Hendrycks & Gimpel 2016), exact by erf or in
// GPT-2's tanh form, and its derivative.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

#include "kernels/vector_loops.h"
#include "kernels/vector_math.h"

namespace {

using mlxgpt::Gelu;
using mlxgpt::Rows;

/// Phi(x), and x Phi'(x).
struct Normal {
    Vec distribution, slope;
};

template <Gelu kind>
inline Normal normal(Vec x) {
    if constexpr (kind == Gelu::kTanh) {
        // (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3). The exponential is taken
        // of -|2u|, so that it can't overflow; and from |x| = 1e4 on, where u soon would and the
        // distribution is 0 or 1 all the same, x stands still. NaN passes.
        constexpr float kSqrt2OverPi = 0.797884560802865356F;
        const Vec y = select(less(set(1e4F), absolute(x)), with_sign(set(1e4F), sign_bit(x)), x);
        const Vec s = y * y;
        const Vec twice_u = y * fma(set(2 * kSqrt2OverPi * 0.044715F), s, set(2 * kSqrt2OverPi));
        const Vec t = exp2_nonpositive(set(-kLog2E) * absolute(twice_u));
        const Vec one = set(1.0F) / (set(1.0F) + t);
        const Vec other = t * one;
        const Vec distribution = select(less(twice_u, set(0.0F)), other, one);
        const Vec twice_du = fma(set(6 * kSqrt2OverPi * 0.044715F), s, set(2 * kSqrt2OverPi));
        return {distribution, y * twice_du * (one * other)};
    } else {
        const Vec half = fma(set(0.5F), erf(set(0.707106781186547524F) * x), set(0.5F));
        const Vec s = absolute(x);
        const Vec b = select(less(set(20.0F), s), set(20.0F), s);
        const Vec density = set(0.398942280401432678F) * exp2_nonpositive(set(-0.5F * kLog2E) * b * b);
        return {half, with_sign(b * density, sign_bit(x))};
    }
}

template <Gelu kind>
void bias_gelu_of(Rows x, int n_rows, int n_cols, const float* bias, Rows out) {
    for (int i = 0; i < n_rows; ++i) {
        float* in = x.data + i * x.stride;
        float* to = out.data + i * out.stride;
        for_vectors(n_cols, [&](ptrdiff_t c, auto some) {
            Vec a = some.read(in + c);
            if (bias != nullptr) {
                a = a + some.read(bias + c);
                some.write(in + c, a);
            }
            some.write(to + c, a * normal<kind>(a).distribution);
        });
    }
}

template <Gelu kind>
void gelu_backward_of(Rows x, int n_rows, int n_cols, Rows dout, Rows out) {
    for (int i = 0; i < n_rows; ++i) {
        const float* in = x.data + i * x.stride;
        float* gradient = dout.data + i * dout.stride;
        float* to = out.data == nullptr ? nullptr : out.data + i * out.stride;
        for_vectors(n_cols, [&](ptrdiff_t c, auto some) {
            const Vec a = some.read(in + c);
            const Normal phi = normal<kind>(a);
            if (to != nullptr) some.write(to + c, a * phi.distribution);
            some.write(gradient + c, some.read(gradient + c) * (phi.distribution + phi.slope));
        });
    }
}

void bias_gelu(Rows x, int n_rows, int n_cols, const float* bias, Gelu kind, Rows out) {
    if (kind == Gelu::kTanh)
        bias_gelu_of<Gelu::kTanh>(x, n_rows, n_cols, bias, out);
    else
        bias_gelu_of<Gelu::kExact>(x, n_rows, n_cols, bias, out);
}

void gelu_backward(Rows x, int n_rows, int n_cols, Gelu kind, Rows dout, Rows out) {
    if (kind == Gelu::kTanh)
        gelu_backward_of<Gelu::kTanh>(x, n_rows, n_cols, dout, out);
    else
        gelu_backward_of<Gelu::kExact>(x, n_rows, n_cols, dout, out);
}

}  // namespace
