// How the work of a call is cut up for the thread pool. Cuts depend on sizes and the number of threads
// alone, so that sums come out the same from run to run.
#pragma once

#include <algorithm>
#include <cstddef>

#include "runtime/parallel.h"

namespace mlxgpt {

struct Range {
    ptrdiff_t begin, size;
};

/// Part `index` of n things in n_parts nearly equal ranges, whose ends are multiples of `step`.
inline Range part_of(ptrdiff_t n, int index, int n_parts, ptrdiff_t step = 1) {
    const ptrdiff_t steps = (n + step - 1) / step;
    const ptrdiff_t begin = std::min(n, steps * index / n_parts * step);
    const ptrdiff_t end = std::min(n, steps * (index + 1) / n_parts * step);
    return {begin, end - begin};
}

/// Tasks for `work` units, so many to a task that waking a thread (about 50 us) pays: `unit` of them at
/// least; and two tasks to a thread if there is enough, for one may be held up by other programs.
inline int n_tasks(double work, double unit) {
    const double most = 2.0 * num_threads();
    const int n = static_cast<int>(std::max(1.0, std::min(most, work / unit)));
    return n > num_threads() && n < 2 * num_threads() ? num_threads() : n;
}

/// About this many elements of simple arithmetic are worth a task of their own.
constexpr double kElementsPerTask = 16384;

}  // namespace mlxgpt
