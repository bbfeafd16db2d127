// Vector mathematics. Each function states its error bound; tests hold it to that.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

namespace {

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2 = 0.693147180559945309F;

/// 2^x for x <= 0, as softmax asks for it: 2 ulp; results below the smallest normal number are 0;
/// NaN stays NaN.
inline Vec exp2_nonpositive(Vec x) {
    // x = n + f with |f| <= 1/2, and 2^f by its Taylor-like minimax polynomial; n goes straight
    // into the exponent.
    const Vec n = round(x);
    const Vec f = x - n;
    Vec p = set(1.5353362e-4F);
    p = fma(p, f, set(1.3398874e-3F));
    p = fma(p, f, set(9.6184370e-3F));
    p = fma(p, f, set(5.5503324e-2F));
    p = fma(p, f, set(2.4022648e-1F));
    p = fma(p, f, set(6.9314720e-1F));
    p = fma(p, f, set(1.0F));
    return select(less(x, set(-126.0F)), set(0.0F), add_to_exponent(p, n));
}

}  // namespace
