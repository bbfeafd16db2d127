// Loops over arrays of any length.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

namespace {

/// The first n elements from p, fewer than a vector has, and `other` in the remaining lanes.
template <class T>
inline Vec load_part(const T* p, int n, T other = {}) {
    T lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : other;
    return load(lanes);
}

/// Stores the first n lanes only.
template <class T>
inline void store_part(T* p, Vec a, int n) {
    T lanes[kLanes];
    store(lanes, a);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

/// Access to as many elements as a vector has.
struct Whole {
    template <class T>
    Vec read(const T* p) const {
        return load(p);
    }
    Vec read_or(float, const float* p) const { return load(p); }
    void write(float* p, Vec a) const { store(p, a); }
};

/// Access to the last n elements, fewer than a vector has. The remaining lanes hold 0, or read_or's first
/// argument.
struct Part {
    int n;
    template <class T>
    Vec read(const T* p) const {
        return load_part(p, n);
    }
    Vec read_or(float other, const float* p) const { return load_part(p, n, other); }
    void write(float* p, Vec a) const { store_part(p, a, n); }
};

/// Calls body(i, some) for i = 0, kLanes, 2 kLanes ... below n; `some` (Whole or Part) reads and writes the
/// elements from i on.
template <class Body>
inline void for_vectors(ptrdiff_t n, Body body) {
    ptrdiff_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, Part{static_cast<int>(n - i)});
}

/// The sum of value(i, some) for i = 0, kLanes, 2 kLanes ... below n: a Vec of terms for the elements from i
/// on. Four sums at once hide the latency of the additions.
template <class Value>
inline float row_sum(int n, Value value) {
    Vec sums[4] = {set(0.0F), set(0.0F), set(0.0F), set(0.0F)};
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int s = 0; s < 4; ++s) sums[s] = sums[s] + value(i + s * kLanes, Whole{});
    for (; i + kLanes <= n; i += kLanes) sums[0] = sums[0] + value(i, Whole{});
    if (i < n) {
        // The lanes after the last element may hold anything.
        float lanes[kLanes];
        store(lanes, value(i, Part{n - i}));
        for (int lane = n - i; lane < kLanes; ++lane) lanes[lane] = 0.0F;
        sums[1] = sums[1] + load(lanes);
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/// The largest element.
inline float largest(Vec a) {
    float lanes[kLanes];
    store(lanes, a);
    float top = lanes[0];
    for (int lane = 1; lane < kLanes; ++lane) top = lanes[lane] > top ? lanes[lane] : top;
    return top;
}

/// y[i] = f(x[i])
template <Vec (*f)(Vec)>
void map(const float* x, float* y, ptrdiff_t n) {
    for_vectors(n, [&](ptrdiff_t i, auto some) { some.write(y + i, f(some.read(x + i))); });
}

}  // namespace
