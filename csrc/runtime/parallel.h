// The thread pool.
#pragma once

#include <functional>

namespace mlxgpt {

/// The number of threads that work on one call: the physical cores that this process's affinity and its
/// cgroup's quota allow, or the environment variable MLXGPT_NUM_THREADS. Looked up once. Throws
/// std::invalid_argument if the variable is not a number from 1 to 1024.
int num_threads();

/// Calls task(index, worker) once for every index below n_tasks, and returns when all calls have ended. Tasks
/// go in order to whichever worker is free. worker is below num_threads(), and no two tasks run at the same
/// time with the same worker, so it may index scratch memory. A task must not throw and must not call
/// parallel_for. Calls from several threads take turns.
void parallel_for(int n_tasks, const std::function<void(int index, int worker)>& task);

}  // namespace mlxgpt
