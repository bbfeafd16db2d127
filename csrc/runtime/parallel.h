// The thread pool.
#pragma once

#include <functional>

namespace mlxgpt {

/// Threads that work on one call: the physical cores that this process may use, within its affinity
/// and its cgroup's quota, or MLXGPT_NUM_THREADS. Looked up once. Throws std::invalid_argument if that
/// variable is not a number from 1 to 1024.
int num_threads();

/// Runs task(index, worker) for every index below n_tasks, each once, and returns when all are done.
/// Tasks are handed out in order, to whichever worker is free; worker is below num_threads(), and no
/// two tasks run at once with the same one, so it may index scratch memory. A task must not throw and
/// must not call parallel_for. Callers from several threads take turns.
void parallel_for(int n_tasks, const std::function<void(int index, int worker)>& task);

}  // namespace mlxgpt
