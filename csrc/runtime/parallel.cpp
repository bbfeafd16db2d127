#include "runtime/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlxgpt {
namespace {

#if defined(__linux__)
int physical_cores() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return static_cast<int>(std::thread::hardware_concurrency());
    std::set<std::string> cores;  // hardware threads of one core have the same list of siblings
    int logical = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        ++logical;
        std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                           "/topology/thread_siblings_list");
        std::string siblings;
        if (std::getline(file, siblings)) cores.insert(siblings);
    }
    return cores.empty() ? logical : static_cast<int>(cores.size());
}

// The quota of a control group in cores, or a large number if it has none. cgroup 2 has "quota period" or
// "max period" in cpu.max; cgroup 1 has two files, with -1 for no limit.
double granted(double quota, double period) { return quota > 0 && period > 0 ? quota / period : 1e9; }

double quota_v2(const std::string& directory) {
    std::ifstream file(directory + "/cpu.max");
    std::string quota;
    double period = 0;
    if (!(file >> quota >> period) || quota == "max") return 1e9;
    return granted(std::atof(quota.c_str()), period);
}

double quota_v1(const std::string& directory) {
    double quota = 0, period = 0;
    std::ifstream(directory + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(directory + "/cpu.cfs_period_us") >> period;
    return granted(quota, period);
}

// The tightest quota of this process's control group and the groups that contain it. In a container the path
// in /proc/self/cgroup may not exist; then the mount's root is the container's own group.
double cgroup_cores() {
    double cores = std::min(quota_v2("/sys/fs/cgroup"), quota_v1("/sys/fs/cgroup/cpu"));
    std::ifstream file("/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        const size_t path_at = line.find(':', line.find(':') + 1);
        if (path_at == std::string::npos) continue;
        for (std::string path = line.substr(path_at + 1); path.size() > 1; path.erase(path.rfind('/')))
            cores =
                std::min({cores, quota_v2("/sys/fs/cgroup" + path), quota_v1("/sys/fs/cgroup/cpu" + path)});
    }
    return cores;
}

int usable_cores() {
    return std::min(physical_cores(), static_cast<int>(std::min(std::ceil(cgroup_cores()), 1e6)));
}
#elif defined(__APPLE__)
// The fast cores only: everyone would wait for a slow one to finish its share.
int usable_cores() {
    int cores = 0;
    size_t size = sizeof cores;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) == 0) return cores;
    size = sizeof cores;
    if (sysctlbyname("hw.physicalcpu", &cores, &size, nullptr, 0) == 0) return cores;
    return static_cast<int>(std::thread::hardware_concurrency());
}
#else
int usable_cores() { return static_cast<int>(std::thread::hardware_concurrency()); }
#endif

/// Tells the processor that the caller waits in a loop.
inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

constexpr int kMostThreads = 1024;

int choose_num_threads() {
    const char* wanted = std::getenv("MLXGPT_NUM_THREADS");
    if (wanted == nullptr || *wanted == '\0') return std::clamp(usable_cores(), 1, kMostThreads);
    char* end = nullptr;
    errno = 0;
    const long n = std::strtol(wanted, &end, 10);
    if (errno != 0 || *end != '\0' || n < 1 || n > kMostThreads)
        throw std::invalid_argument("MLXGPT_NUM_THREADS is '" + std::string(wanted) +
                                    "', expected a whole number from 1 to " + std::to_string(kMostThreads));
    return static_cast<int>(n);
}

using Task = std::function<void(int, int)>;

// The kernels of a model follow each other within tens of microseconds, and waking a sleeping thread takes as
// long or longer: so a thread keeps looking for work for this long before it sleeps.
constexpr auto kAwake = std::chrono::microseconds(100);

/// Waits for a condition without sleeping, and returns whether it came. Gives up when `going_on` has been
/// false for kAwake.
template <class Condition, class GoingOn>
bool spin_until(const Condition& condition, const GoingOn& going_on) {
    auto end = std::chrono::steady_clock::now() + kAwake;
    for (;;) {
        for (int i = 0; i < 32; ++i) {
            if (condition()) return true;
            pause();
        }
        const auto now = std::chrono::steady_clock::now();
        if (going_on())
            end = now + kAwake;
        else if (now >= end)
            return false;
    }
}

#if defined(__linux__)
// The processors that the threads of the pool run on. The scheduler may wake a thread on the processor of the
// thread that woke it and leave both there, while another processor idles: on two cores of a virtual machine
// (Linux 6.18) a product then took 1600 us instead of 700, for tens of milliseconds. So a thread that begins
// a job on the processor of another thread moves to a free one. It is not bound to it: the scheduler may move
// it again.
class Processors {
  public:
    explicit Processors(int n_threads) : cpus_(static_cast<size_t>(n_threads)) {
        for (auto& cpu : cpus_) cpu.store(-1, std::memory_order_relaxed);
    }

    /// Notes where thread `index` runs, after a move if a thread that is awake already runs there.
    void take(int index) {
        leave(index);
        const int cpu = sched_getcpu();
        for (const auto& taken : cpus_)
            if (cpu >= 0 && taken.load(std::memory_order_relaxed) == cpu) {
                move_to_free();
                break;
            }
        cpus_[index].store(sched_getcpu(), std::memory_order_relaxed);
    }
    void leave(int index) { cpus_[index].store(-1, std::memory_order_relaxed); }

  private:
    void move_to_free() {
        cpu_set_t allowed;
        if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
        cpu_set_t free = allowed;
        for (const auto& cpu : cpus_)
            if (const int taken = cpu.load(std::memory_order_relaxed); taken >= 0) CPU_CLR(taken, &free);
        if (CPU_COUNT(&free) == 0 || sched_setaffinity(0, sizeof free, &free) != 0) return;
        sched_setaffinity(0, sizeof allowed, &allowed);
    }

    std::vector<std::atomic<int>> cpus_;
};
#else
struct Processors {
    explicit Processors(int) {}
    void take(int) {}
    void leave(int) {}
};
#endif

// Workers sleep on a condition variable if no job comes for a while. The caller is worker 0 and starts at
// once, so that a small job is often done before a sleeping worker has woken up.
class Pool {
  public:
    explicit Pool(int n_threads) : processors_(n_threads) {
        for (int worker = 1; worker < n_threads; ++worker)
            std::thread([this, worker] { serve(worker); }).detach();
    }

    void run(int n_tasks, const Task& task) {
        processors_.take(0);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            n_tasks_ = n_tasks;
            next_ = 0;
            ++job_;
        }
        wake_.notify_all();
        work(task, n_tasks, 0);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            task_ = nullptr;  // a worker that wakes up from now on finds nothing to do
        }
        const auto finished = [this] { return busy_.load(std::memory_order_acquire) == 0; };
        if (spin_until(finished, [] { return false; })) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, finished);
    }

  private:
    void work(const Task& task, int n_tasks, int worker) {
        for (int index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks;)
            task(index, worker);
    }

    void serve(int worker) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (unsigned long seen = job_;;) {
            const auto there_is_a_job = [&] { return job_.load(std::memory_order_acquire) != seen; };
            lock.unlock();
            // While the caller still works on its last tasks, the next job is near.
            spin_until(there_is_a_job, [&] { return task_.load(std::memory_order_relaxed) != nullptr; });
            lock.lock();
            if (!there_is_a_job()) processors_.leave(worker);
            wake_.wait(lock, there_is_a_job);
            seen = job_;
            if (task_ == nullptr) continue;
            const Task& task = *task_.load();
            const int n_tasks = n_tasks_;
            ++busy_;
            lock.unlock();
            processors_.take(worker);
            work(task, n_tasks, worker);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    Processors processors_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic<const Task*> task_{nullptr};
    int n_tasks_ = 0;
    std::atomic<unsigned long> job_{0};
    std::atomic<int> busy_{0};
    std::atomic<int> next_{0};
};

// `turn` is held while a job runs, so that callers take turns, and during a fork, so that a child process
// never inherits a job half done. The child has no workers: it forgets the pool and makes its own when it
// needs one. A pool is never destroyed, because its threads may outlive every static object.
std::mutex turn;
Pool* pool = nullptr;

[[maybe_unused]] const int fork_handlers = pthread_atfork([] { turn.lock(); }, [] { turn.unlock(); },
                                                          [] {
                                                              pool = nullptr;
                                                              turn.unlock();
                                                          });

}  // namespace

int num_threads() {
    static const int n = choose_num_threads();
    return n;
}

void parallel_for(int n_tasks, const Task& task) {
    const std::lock_guard<std::mutex> lock(turn);
    if (n_tasks > 1 && num_threads() > 1) {
        if (pool == nullptr) pool = new Pool(num_threads());
        pool->run(n_tasks, task);
        return;
    }
    for (int index = 0; index < n_tasks; ++index) task(index, 0);
}

}  // namespace mlxgpt
