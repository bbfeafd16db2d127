// How the work of a call is divided into tasks for the thread pool. The division depends on sizes and the
// number of threads alone, so that sums have the same bits from run to run.
#pragma once

#include <algorithm>
#include <cstddef>

#include "runtime/parallel.h"

namespace mlxgpt {

struct Range {
    ptrdiff_t begin, size;
};

/// Part `index` of n things in n_parts nearly equal ranges. All ends but the last are multiples of `step`.
inline Range part_of(ptrdiff_t n, int index, int n_parts, ptrdiff_t step = 1) {
    const ptrdiff_t steps = (n + step - 1) / step;
    const ptrdiff_t begin = std::min(n, steps * index / n_parts * step);
    const ptrdiff_t end = std::min(n, steps * (index + 1) / n_parts * step);
    return {begin, end - begin};
}

/// The number of tasks for `work` units of which a task should have at least `unit`, so that waking a thread
/// (about 50 us) pays. At most two tasks a thread: with two, a thread that other programs hold up leaves its
/// second to another.
inline int n_tasks(double work, double unit) {
    const double most = 2.0 * num_threads();
    const int n = static_cast<int>(std::max(1.0, std::min(most, work / unit)));
    return n > num_threads() && n < 2 * num_threads() ? num_threads() : n;
}

/// Elements of simple arithmetic that are worth a task of their own.
constexpr double kElementsPerTask = 16384;

/// Calls body(part) in parallel for parts of n_rows rows of n_cols elements of simple arithmetic.
template <class Body>
void parallel_rows(ptrdiff_t n_rows, ptrdiff_t n_cols, const Body& body) {
    const int n_parts = n_tasks(static_cast<double>(n_rows) * static_cast<double>(n_cols), kElementsPerTask);
    parallel_for(n_parts, [&](int task, int) { body(part_of(n_rows, task, n_parts)); });
}

}  // namespace mlxgpt
