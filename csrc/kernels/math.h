// Vector mathematics. Each function states its error bound in ulp, units in the last place of the exact
// result; csrc/test_kernels.cpp holds it to that over the whole range of float32.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

namespace {

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2 = 0.693147180559945309F;

/// 2^x for x <= 0, as softmax asks for it: 1.2 ulp; results below the smallest normal number are 0;
/// NaN stays NaN.
inline Vec exp2_nonpositive(Vec x) {
    // x = n + f with |f| <= 1/2, and 2^f by its minimax polynomial; n goes straight into the exponent.
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
    // Beyond these everything is 0 or infinity. A NaN as the second operand of max and min stays.
    x = min(set(89.0F), max(set(-104.0F), x));
    const Vec n = round(x * set(kLog2E));
    Vec f = fma(n, set(-0.693359375F), x);  // ln 2 in two parts, the first exact in a product with n
    f = fma(n, set(2.12194440e-4F), f);
    Vec p = set(1.9875691500e-4F);  // Cephes expf
    p = fma(p, f, set(1.3981999507e-3F));
    p = fma(p, f, set(8.3334519073e-3F));
    p = fma(p, f, set(4.1665795894e-2F));
    p = fma(p, f, set(1.6666665459e-1F));
    p = fma(p, f, set(5.0000001201e-1F));
    p = fma(p, f * f, f) + set(1.0F);
    // 2^n in two steps: n may be out of a normal number's range where the result is not.
    const Vec half = round(n * set(0.5F));
    return p * add_to_exponent(set(1.0F), half) * add_to_exponent(set(1.0F), n - half);
}

/// ln x: 1 ulp; subnormal x too; -inf at 0, NaN below.
inline Vec log(Vec x) {
    const Mask small = less(x, set(1.17549435e-38F));
    const Vec scaled = select(small, x * set(8388608.0F), x);  // 2^23
    const Vec n = exponent(scaled);
    const Vec f = add_to_exponent(scaled, set(0.0F) - n) - set(1.0F);  // sqrt(1/2) - 1 <= f < sqrt(2) - 1
    const Vec e = select(small, n - set(23.0F), n);
    Vec p = set(7.0376836292e-2F);  // Cephes logf
    p = fma(p, f, set(-1.1514610310e-1F));
    p = fma(p, f, set(1.1676998740e-1F));
    p = fma(p, f, set(-1.2420140846e-1F));
    p = fma(p, f, set(1.4249322787e-1F));
    p = fma(p, f, set(-1.6668057665e-1F));
    p = fma(p, f, set(2.0000714765e-1F));
    p = fma(p, f, set(-2.4999993993e-1F));
    p = fma(p, f, set(3.3333331174e-1F));
    const Vec square = f * f;
    Vec tail = fma(p * f, square, e * set(-2.12194440e-4F));
    tail = fma(square, set(-0.5F), tail);
    Vec result = fma(e, set(0.693359375F), f + tail);
    result = select(less(x, set(INFINITY)), result, x);  // infinity and NaN
    result = select(less(x, set(0.0F)), set(NAN), result);
    return select(less(absolute(x), set(1e-45F)), set(-INFINITY), result);
}

/// tanh x: 2 ulp.
inline Vec tanh(Vec x) {
    const Vec size = absolute(x);
    const Vec square = x * x;
    Vec p = set(-5.70498872745e-3F);  // Cephes tanhf, up to 0.625
    p = fma(p, square, set(2.06390887954e-2F));
    p = fma(p, square, set(-5.37397155531e-2F));
    p = fma(p, square, set(1.33314422036e-1F));
    p = fma(p, square, set(-3.33332819422e-1F));
    const Vec near = fma(p * square, x, x);
    const Vec far = set(1.0F) - set(2.0F) / (exp(size + size) + set(1.0F));
    return select(less(size, set(0.625F)), near, with_sign(far, x));
}

/// erf x: 2 ulp.
inline Vec erf(Vec x) {
    const Vec size = absolute(x);
    const Vec square = x * x;
    // Both polynomials are N. Juffa's (stackoverflow.com/a/35148199).
    Vec p = set(-5.96761703e-4F);
    p = fma(p, square, set(4.99119423e-3F));
    p = fma(p, square, set(-2.67681349e-2F));
    p = fma(p, square, set(1.12819925e-1F));
    p = fma(p, square, set(-3.76125336e-1F));
    p = fma(p, square, set(1.28379166e-1F));
    const Vec near = fma(p, x, x);
    const Vec t = min(set(4.0F), size);  // erf(4) is 1 in float32; a NaN stays
    Vec q = fma(set(-1.72853470e-5F), t, set(3.83197126e-4F));
    q = fma(q, t * t, fma(set(-3.88396438e-3F), t, set(2.42546219e-2F)));
    q = fma(q, t, set(-1.06777877e-1F));
    q = fma(q, t, set(-6.34846687e-1F));
    q = fma(q, t, set(-1.28717512e-1F));
    q = fma(q, t, set(0.0F) - t);
    const Vec far = set(1.0F) - exp(q);
    return select(less(size, set(0.927734375F)), near, with_sign(far, x));
}

template <Vec (*f)(Vec)>
void map(const float* x, float* y, size_t n) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
    float rest[kLanes] = {};
    for (size_t j = i; j < n; ++j) rest[j - i] = x[j];
    store(rest, f(load(rest)));
    for (size_t j = i; j < n; ++j) y[j] = rest[j - i];
}

}  // namespace
