#include "thread_pool.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

#include <exception>
#include <string>
#include <system_error>

#include "errors.hpp"

namespace dipper {

namespace {

// About 50 us of spinning: sections of a token follow each other within that, waits for flash or the user do not.
constexpr int kSpins = 2000;

template <typename Condition>
bool spin_until(Condition&& done) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return true;
    cpu_relax();
  }
  return false;
}

// CPUs that the calling thread may run on; empty where that cannot be told.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
#endif
  return cpus;
}

// Best effort: where pinning is refused the threads run unpinned.
void pin_to(const std::vector<int>& cpus) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);
#else
  (void)cpus;
#endif
}

}  // namespace

ThreadPool::PinnedCaller::PinnedCaller(const ThreadPool& pool) {
  if (pool.cpus_.empty()) return;
  before_ = allowed_cpus();
  pin_to({pool.cpus_.front()});
}

ThreadPool::PinnedCaller::~PinnedCaller() {
  if (!before_.empty()) pin_to(before_);
}

ThreadPool::ThreadPool(int n_threads) {
  if (const std::vector<int> cpus = allowed_cpus(); n_threads > 1 && static_cast<size_t>(n_threads) == cpus.size()) {
    cpus_ = cpus;  // with CPUs to spare, which of them to take is the scheduler's to know
  }
  try {
    for (int t = 1; t < n_threads; ++t) workers_.emplace_back([this, t] { work(t); });
  } catch (const std::system_error& e) {
    const size_t n = workers_.size() + 1;
    stop();
    throw ConfigError("the system gives no more than " + std::to_string(n) + " threads of " +
                      std::to_string(n_threads) + " (" + e.what() + "): lower --threads");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_.store(true);
  round_.fetch_add(1);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& task) {
  if (workers_.empty()) return task(0);
  task_ = &task;
  running_.store(static_cast<int32_t>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  std::exception_ptr error;
  try {
    task(0);
  } catch (...) {
    error = std::current_exception();
  }
  while (!spin_until([&] { return running_.load(std::memory_order_acquire) == 0; })) {
    const int32_t left = running_.load(std::memory_order_acquire);
    if (left != 0) running_.wait(left, std::memory_order_acquire);
  }
  if (error) std::rethrow_exception(error);
}

void ThreadPool::work(int thread) {
  if (!cpus_.empty()) pin_to({cpus_[static_cast<size_t>(thread)]});
  uint32_t seen = 0;
  for (;;) {
    if (!spin_until([&] { return round_.load(std::memory_order_acquire) != seen; }))
      round_.wait(seen, std::memory_order_acquire);
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (round == seen) continue;
    seen = round;
    if (stop_.load()) return;
    (*task_)(thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

}  // namespace dipper
