// Loops over arrays of any length.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

namespace {

/// A whole vector's worth of elements.
struct Whole {
    Vec read(const float* p) const { return load(p); }
    Vec read_or(float, const float* p) const { return load(p); }
    void write(float* p, Vec a) const { store(p, a); }
};

/// The last n elements, fewer than a vector has. The lanes behind them hold 0, or what read_or was told.
struct Part {
    int n;
    Vec read(const float* p) const { return read_or(0.0F, p); }
    Vec read_or(float other, const float* p) const {
        float lanes[kLanes];
        for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : other;
        return load(lanes);
    }
    void write(float* p, Vec a) const {
        float lanes[kLanes];
        store(lanes, a);
        for (int i = 0; i < n; ++i) p[i] = lanes[i];
    }
};

/// body(i, some) for i = 0, kLanes, 2 kLanes ... below n: `some` reads and writes the elements from i on.
template <class Body>
inline void for_vectors(ptrdiff_t n, Body body) {
    ptrdiff_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, Part{static_cast<int>(n - i)});
}

}  // namespace
