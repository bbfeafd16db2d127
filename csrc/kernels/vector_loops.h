// Loops over arrays of any length.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

namespace {

/// n elements of a row, fewer than a vector has, and `other` behind them.
template <class T>
inline Vec load_part(const T* p, int n, T other = {}) {
    T lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : other;
    return load(lanes);
}

template <class T>
inline void store_part(T* p, Vec a, int n) {
    T lanes[kLanes];
    store(lanes, a);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

/// A whole vector's worth of elements.
struct Whole {
    template <class T>
    Vec read(const T* p) const {
        return load(p);
    }
    Vec read_or(float, const float* p) const { return load(p); }
    void write(float* p, Vec a) const { store(p, a); }
};

/// The last n elements, fewer than a vector has. The lanes behind them hold 0, or what read_or was told.
struct Part {
    int n;
    template <class T>
    Vec read(const T* p) const {
        return load_part(p, n);
    }
    Vec read_or(float other, const float* p) const { return load_part(p, n, other); }
    void write(float* p, Vec a) const { store_part(p, a, n); }
};

/// body(i, some) for i = 0, kLanes, 2 kLanes ... below n: `some` reads and writes the elements from i on.
template <class Body>
inline void for_vectors(ptrdiff_t n, Body body) {
    ptrdiff_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, Part{static_cast<int>(n - i)});
}

/// y[i] = f(x[i])
template <Vec (*f)(Vec)>
void map(const float* x, float* y, ptrdiff_t n) {
    for_vectors(n, [&](ptrdiff_t i, auto some) { some.write(y + i, f(some.read(x + i))); });
}

}  // namespace
