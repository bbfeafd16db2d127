// Mathematical functions of vectors. Each states its error bound in ulp, units in the last place of the exact
// result; csrc/tests/test_kernels.cpp and tests/cpu/test_vector_math.py test it over the whole range of
// float32.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include <math.h>

namespace {

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2 = 0.693147180559945309F;

/// An activation function is x g(x), with the derivative g(x) + x g'(x). These are g(x) and x g'(x).
struct Gate {
    Vec value, slope;
};

/// 2^x for x <= 0, which is all that softmax needs: 1.2 ulp; results below the smallest normal number are 0;
/// NaN stays NaN.
inline Vec exp2_nonpositive(Vec x) {
    // x = n + f with |f| <= 1/2; 2^f by a minimax polynomial, and n is added to the exponent's bits.
    const Vec n = round(x);
    const Vec f = x - n;
    Vec p = set(1.5353362e-4F);
    p = fma(p, f, set(1.3398874e-3F));
    p = fma(p, f, set(9.6184370e-3F));
    p = fma(p, f, set(5.5503324e-2F));
    p = fma(p, f, set(2.4022648e-1F));
    p = fma(p, f, set(6.9314720e-1F));
    p = fma(p, f, set(1.0F));
    return zero_where(less(x, set(-126.0F)), add_to_exponent(p, n));
}

/// e^x: 1.1 ulp, subnormal results included.
inline Vec exp(Vec x) {
    // Beyond these bounds the result is 0 or infinity. max and min return their second operand if it is NaN.
    x = min(set(89.0F), max(set(-104.0F), x));
    const Vec n = round(x * set(kLog2E));
    Vec f = fma(n, set(-0.693359375F), x);  // ln 2 in two parts; n times the first is exact
    f = fma(n, set(2.12194440e-4F), f);
    Vec p = set(1.9875691500e-4F);  // Cephes expf
    p = fma(p, f, set(1.3981999507e-3F));
    p = fma(p, f, set(8.3334519073e-3F));
    p = fma(p, f, set(4.1665795894e-2F));
    p = fma(p, f, set(1.6666665459e-1F));
    p = fma(p, f, set(5.0000001201e-1F));
    p = fma(p, f * f, f) + set(1.0F);
    // 2^n in two factors: 2^n may be out of range although the result is not.
    const Vec half = round(n * set(0.5F));
    return p * add_to_exponent(set(1.0F), half) * add_to_exponent(set(1.0F), n - half);
}

inline UVec sign_bit(Vec x) { return bits(x) & set_u(0x80000000U); }
inline Vec absolute(Vec x) { return from_bits(bits(x) & set_u(0x7FFFFFFFU)); }
inline Vec with_sign(Vec magnitude, UVec sign) { return from_bits(bits(magnitude) ^ sign); }

/// tanh: 2 ulp. Infinities give 1 and -1, NaN stays NaN, and the sign of zero is kept.
inline Vec tanh(Vec x) {
    const Vec a = absolute(x);
    // Near 0 an odd polynomial (Cephes' tanhf), because (1 - e^-2a) / (1 + e^-2a) would lose digits.
    const Vec s = x * x;
    Vec p = set(-5.70498872745e-3F);
    p = fma(p, s, set(2.06390887954e-2F));
    p = fma(p, s, set(-5.37397155531e-2F));
    p = fma(p, s, set(1.33314422036e-1F));
    p = fma(p, s, set(-3.33332819422e-1F));
    const Vec small = fma(p * s, a, a);
    const Vec t = exp2_nonpositive(set(-2.0F * kLog2E) * a);
    const Vec large = (set(1.0F) - t) / (set(1.0F) + t);
    return with_sign(select(less(a, set(0.625F)), small, large), sign_bit(x));
}

/// The error function: 1.5 ulp. Infinities give 1 and -1, NaN stays NaN, and the sign of zero is kept. Two
/// polynomials by Norbert Juffa, https://stackoverflow.com/a/35148199.
inline Vec erf(Vec x) {
    const Vec a = absolute(x);
    const Vec s = x * x;
    Vec p = set(-5.96761703e-4F);
    p = fma(p, s, set(4.99119423e-3F));
    p = fma(p, s, set(-2.67681349e-2F));
    p = fma(p, s, set(1.12819925e-1F));
    p = fma(p, s, set(-3.76125336e-1F));
    p = fma(p, s, set(1.28379166e-1F));
    const Vec small = fma(p, x, x);
    // 1 - exp(q(a)). From a = 4 on this is 1; the clamp keeps q from overflowing.
    const Vec b = select(less(set(4.0F), a), set(4.0F), a);
    Vec q = fma(fma(set(-1.72853470e-5F), b, set(3.83197126e-4F)), b * b,
                fma(set(-3.88396438e-3F), b, set(2.42546219e-2F)));
    q = fma(q, b, set(-1.06777877e-1F));
    q = fma(q, b, set(-6.34846687e-1F));
    q = fma(q, b, set(-1.28717512e-1F));
    q = fma(q, b, set(0.0F) - b);
    const Vec large = with_sign(set(1.0F) - exp2_nonpositive(set(kLog2E) * q), sign_bit(x));
    return select(less(a, set(0.927734375F)), small, large);
}

/// Natural logarithm: 1.1 ulp, denormal numbers included. 0 gives -inf, a negative number or NaN gives NaN.
inline Vec log(Vec x) {
    const Mask denormal = less(x, set(1.17549435e-38F));
    const Vec y = select(denormal, x * set(8388608.0F), x);  // times 2^23
    // y = m 2^e with m in [2/3, 4/3): the bits of y minus those of 2/3 hold e in the exponent's place.
    const UVec two_thirds = set_u(0x3F2AAAABU);
    const UVec above = bits(y) - two_thirds;
    const Vec m = from_bits((above & set_u(0x007FFFFFU)) + two_thirds);
    // The shift is unsigned, so 128 is added to e before it and subtracted after it.
    const Vec e =
        to_float(exponent_field(above + set_u(0x40000000U))) - select(denormal, set(151.0F), set(128.0F));
    const Vec f = m - set(1.0F);
    const Vec s = f * f;
    // log(1 + f) on [-1/3, 1/3], minimax, by Norbert Juffa, https://stackoverflow.com/a/39822314.
    Vec r = fma(set(-0.130310059F), f, set(0.140869141F));
    const Vec t = fma(set(-0.121483512F), f, set(0.139814854F));
    r = fma(r, s, t);
    r = fma(r, f, set(-0.166846126F));
    r = fma(r, f, set(0.200120345F));
    r = fma(r, f, set(-0.249996200F));
    r = fma(r, f, set(0.333331972F));
    r = fma(r, f, set(-0.5F));
    r = fma(r, s, f);
    r = fma(e, set(kLn2), r);
    const Vec positive = select(less(x, set(INFINITY)), r, x);
    const Vec other = select(less(x, set(0.0F)), set(NAN), x - set(INFINITY));  // 0 and NaN
    return select(less(set(0.0F), x), positive, other);
}

}  // namespace
