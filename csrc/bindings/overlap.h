// Whether two strided arrays share memory. Views of one array may interleave without sharing an element, like
// q, k and v in one packed array.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <map>
#include <utility>
#include <vector>

namespace mlxgpt {

/// An array: elements of `item` bytes at data + the sum of strides[axis] * index[axis], strides in bytes.
struct Layout {
    const void* data;
    ptrdiff_t item;
    const std::vector<ptrdiff_t>&shape, &strides;
};

namespace overlap {

/// The addresses of an array's first byte and of the end of its last.
inline std::pair<const char*, const char*> span(const Layout& a) {
    const char *begin = static_cast<const char*>(a.data), *end = begin + a.item;
    for (size_t axis = 0; axis < a.shape.size(); ++axis)
        (a.strides[axis] < 0 ? begin : end) += a.strides[axis] * (a.shape[axis] - 1);
    return {begin, end};
}

/// One term, stride * index, of a distance in memory, with least <= index <= most and stride > 0.
struct Term {
    ptrdiff_t stride = 0, least = 0, most = 0;
};

inline ptrdiff_t floor_of(ptrdiff_t a, ptrdiff_t b) { return a / b - (a % b < 0 ? 1 : 0); }

/// Whether the terms from `first` on can add up to the distance. Terms are in order of strides, largest
/// first. Each try takes one of `steps`; without any left, the answer is yes.
inline bool reach(const std::vector<Term>& terms, size_t first, ptrdiff_t distance, int& steps) {
    if (first == terms.size()) return distance == 0;
    ptrdiff_t least = 0, most = 0;  // the range of the smaller terms' sum
    for (size_t i = first + 1; i < terms.size(); ++i) {
        least += terms[i].stride * terms[i].least;
        most += terms[i].stride * terms[i].most;
    }
    const Term& term = terms[first];
    const ptrdiff_t last = std::min(term.most, floor_of(distance - least, term.stride));
    for (ptrdiff_t i = std::max(term.least, -floor_of(most - distance, term.stride)); i <= last; ++i)
        if (--steps < 0 || reach(terms, first + 1, distance - i * term.stride, steps)) return true;
    return false;
}

}  // namespace overlap

/// Whether a byte belongs to both arrays. In general this is as hard as an integer program. But if each
/// stride exceeds all that the smaller ones span, as in views of one array, only two or three indices of each
/// axis need trying. If it takes more than 10,000 steps, the answer is yes.
inline bool share_memory(const Layout& a, const Layout& b) {
    const auto [a_begin, a_end] = overlap::span(a);
    const auto [b_begin, b_end] = overlap::span(b);
    if (a_end <= b_begin || b_end <= a_begin) return false;
    // The terms of (offset in a) - (offset in b), by stride. A byte within an element has stride 1.
    std::map<ptrdiff_t, overlap::Term, std::greater<ptrdiff_t>> by_stride;
    const auto add = [&](ptrdiff_t stride, ptrdiff_t most) {  // stride * index, 0 <= index <= most
        if (stride == 0) return;
        overlap::Term& term = by_stride[std::abs(stride)];
        term.stride = std::abs(stride);
        (stride > 0 ? term.most : term.least) += stride > 0 ? most : -most;
    };
    for (size_t axis = 0; axis < a.shape.size(); ++axis) add(a.strides[axis], a.shape[axis] - 1);
    for (size_t axis = 0; axis < b.shape.size(); ++axis) add(-b.strides[axis], b.shape[axis] - 1);
    add(1, a.item - 1);
    add(-1, b.item - 1);
    std::vector<overlap::Term> terms;
    for (const auto& [stride, term] : by_stride) terms.push_back(term);
    int steps = 10000;
    return overlap::reach(terms, 0, static_cast<const char*>(b.data) - static_cast<const char*>(a.data),
                          steps);
}

}  // namespace mlxgpt
