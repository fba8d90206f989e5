// run(task) calls task(0..n-1) once on each, the caller being 0. Waiting threads spin briefly,
// then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace dipper {

// Tells the CPU that this is a spin loop.
inline void cpu_relax() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#else
  std::this_thread::yield();
#endif
}

// Share [first, last) of n items for one of n_threads threads.
struct Share {
  int32_t first;
  int32_t last;
};
inline Share share(int32_t n, int thread, int n_threads) {
  return {static_cast<int32_t>(static_cast<int64_t>(n) * thread / n_threads),
          static_cast<int32_t>(static_cast<int64_t>(n) * (thread + 1) / n_threads)};
}

// A fixed team of threads, each on a CPU of its own: left alone, the scheduler wakes a sleeping worker on its waker's
// CPU, where both then share one core for milliseconds while another idles (measured: a third of the speed with two
// threads on two cores).
class ThreadPool {
 public:
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }
  // The task must not throw on threads other than the caller's; if it throws on the caller's, the others are joined
  // first.
  void run(const std::function<void(int thread)>& task);
  // fn(first, last) over n items in shares of the threads; on the caller alone where there are fewer than `enough`.
  template <typename Fn>
  void share_out(int32_t n, int32_t enough, Fn&& fn) {
    if (n < enough) return fn(0, n);
    run([&](int thread) {
      const auto [first, last] = share(n, thread, size());
      fn(first, last);
    });
  }

  // Keeps the calling thread on the team's first CPU while it lives; its own affinity comes back afterwards.
  class PinnedCaller {
   public:
    explicit PinnedCaller(const ThreadPool& pool);
    ~PinnedCaller();
    PinnedCaller(const PinnedCaller&) = delete;
    PinnedCaller& operator=(const PinnedCaller&) = delete;

   private:
    std::vector<int> before_;  // empty: nothing was changed
  };

 private:
  void work(int thread);
  void stop();

  std::vector<int> cpus_;  // by thread; empty where the system cannot pin
  std::vector<std::thread> workers_;
  const std::function<void(int)>* task_ = nullptr;
  std::atomic<uint32_t> round_{0};
  std::atomic<int32_t> running_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace dipper
