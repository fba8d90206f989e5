#include "thread_pool.hpp"

#include <exception>

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

}  // namespace

ThreadPool::ThreadPool(int n_threads) {
  for (int t = 1; t < n_threads; ++t) workers_.emplace_back([this, t] { work(t); });
}

ThreadPool::~ThreadPool() {
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
