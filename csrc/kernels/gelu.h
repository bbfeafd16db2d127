// GELU, x Phi(x) with Phi the normal distribution function (Hendrycks & Gimpel 2016), and its derivative, in
// GPT-2's tanh form and in the exact form with erf.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include "kernels/vector_math.h"

namespace {

/// GPT-2's form: Phi(x) = (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3).
inline Gate gelu_new(Vec x) {
    // (1 + tanh u) / 2 = 1 / (1 + e^-2u). The exponential is taken of -|2u|, so that it can't overflow. u
    // itself would overflow soon after |x| = 1e4, where Phi is 0 or 1 already: x is clamped there. NaN
    // passes.
    constexpr float kSqrt2OverPi = 0.797884560802865356F;
    const Vec y = select(less(set(1e4F), absolute(x)), with_sign(set(1e4F), sign_bit(x)), x);
    const Vec s = y * y;
    const Vec twice_u = y * fma(set(2 * kSqrt2OverPi * 0.044715F), s, set(2 * kSqrt2OverPi));
    const Vec t = exp2_nonpositive(set(-kLog2E) * absolute(twice_u));
    const Vec one = set(1.0F) / (set(1.0F) + t);
    const Vec other = t * one;
    const Vec phi = select(less(twice_u, set(0.0F)), other, one);
    const Vec twice_du = fma(set(6 * kSqrt2OverPi * 0.044715F), s, set(2 * kSqrt2OverPi));
    return {phi, y * twice_du * (one * other)};
}

/// The exact form: Phi(x) = (1 + erf(x / sqrt 2)) / 2, and Phi' the normal density.
inline Gate gelu(Vec x) {
    const Vec phi = fma(set(0.5F), erf(set(0.707106781186547524F) * x), set(0.5F));
    const Vec s = absolute(x);
    const Vec b = select(less(set(20.0F), s), set(20.0F), s);  // the density is 0 there, and b^2 stays finite
    const Vec density = set(0.398942280401432678F) * exp2_nonpositive(set(-0.5F * kLog2E) * b * b);
    return {phi, with_sign(b * density, sign_bit(x))};
}

}  // namespace
