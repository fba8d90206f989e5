#include "dram_probe.hpp"

#include <algorithm>
#include <array>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "errors.hpp"

namespace dipper {
namespace {

using Clock = std::chrono::steady_clock;

// Independent sums, so that loads and not additions are the limit; the compiler makes vectors of them.
uint64_t sum_words(const uint64_t* words, size_t n_words) {
  constexpr size_t kLanes = 32;
  std::array<uint64_t, kLanes> sums{};
  for (size_t i = 0; i + kLanes <= n_words; i += kLanes) {
    for (size_t k = 0; k < kLanes; ++k) sums[k] += words[i + k];
  }
  uint64_t total = 0;
  for (const uint64_t s : sums) total += s;
  return total;
}

struct Free {
  void operator()(uint64_t* p) const { std::free(p); }
};

}  // namespace

double dram_read_gbps(int n_threads, uint64_t bytes, double seconds) {
  constexpr uint64_t kAlignment = 4096;
  if (n_threads < 1 || n_threads > 1024 || bytes < (1 << 20)) {
    throw ConfigError("dram_read_gbps: n_threads " + std::to_string(n_threads) +
                      " must be between 1 and 1024 and bytes " + std::to_string(bytes) + " at least 1 MiB.");
  }
  const size_t part_bytes = bytes / static_cast<uint64_t>(n_threads) / kAlignment * kAlignment;
  const size_t part_words = part_bytes / sizeof(uint64_t);
  const std::unique_ptr<uint64_t, Free> owner(static_cast<uint64_t*>(
      std::aligned_alloc(kAlignment, std::max(part_bytes * static_cast<size_t>(n_threads), size_t{kAlignment}))));
  if (!owner) throw std::bad_alloc();
  uint64_t* const words = owner.get();

  std::vector<double> pass_s;
  std::vector<uint64_t> sums(static_cast<size_t>(n_threads));
  bool done = false;
  const Clock::time_point end =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  Clock::time_point last;
  // Runs on one thread when all have finished a pass. The first call ends the filling of the buffer.
  const auto on_pass = [&]() noexcept {
    const Clock::time_point now = Clock::now();
    if (last != Clock::time_point{}) pass_s.push_back(std::chrono::duration<double>(now - last).count());
    last = now;
    done = now >= end && !pass_s.empty();
  };
  pass_s.reserve(1 << 16);
  std::barrier barrier(n_threads, on_pass);
  const auto work = [&](size_t thread) {
    uint64_t* const part = words + thread * part_words;
    for (size_t i = 0; i < part_words; ++i) part[i] = i;  // written by its reader: on its NUMA node
    barrier.arrive_and_wait();
    while (!done) {
      sums[thread] += sum_words(part, part_words);
      barrier.arrive_and_wait();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (size_t t = 1; t < static_cast<size_t>(n_threads); ++t) threads.emplace_back(work, t);
    work(0);
  }
  // The sums are used, so that no pass can be left out.
  volatile uint64_t sink = 0;
  for (const uint64_t s : sums) sink = sink + s;
  std::nth_element(pass_s.begin(), pass_s.begin() + static_cast<std::ptrdiff_t>(pass_s.size() / 2), pass_s.end());
  const double median_s = pass_s[pass_s.size() / 2];
  return static_cast<double>(part_bytes) * n_threads / median_s * 1e-9;
}

}  // namespace dipper
