#include "dram_probe.hpp"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "arena.hpp"
#include "errors.hpp"
#include "stopwatch.hpp"
#include "thread_pool.hpp"

namespace dipper {
namespace {

constexpr size_t kLineBytes = 64;
constexpr size_t kPageBytes = 4096;

// A line at a time into sums of its own words: one stream, which hardware prefetchers follow, and few enough sums for
// the registers of any instruction set. Wider loads, more streams or prefetches read no faster.
uint64_t sum_lines(const Arena& part) {
  constexpr size_t kWords = kLineBytes / sizeof(uint64_t);
  const auto* words = reinterpret_cast<const uint64_t*>(part.data());
  const size_t n_words = part.bytes() / sizeof(uint64_t);
  std::array<uint64_t, kWords> sums{};
  for (size_t i = 0; i + kWords <= n_words; i += kWords) {
    for (size_t k = 0; k < kWords; ++k) sums[k] += words[i + k];
  }
  uint64_t total = 0;
  for (const uint64_t s : sums) total += s;
  return total;
}

}  // namespace

double dram_read_gbps(int n_threads, uint64_t bytes, double seconds) {
  if (n_threads < 1 || n_threads > 1024 || bytes < (1 << 20)) {
    throw ConfigError("dram_read_gbps: n_threads " + std::to_string(n_threads) +
                      " must be between 1 and 1024 and bytes " + std::to_string(bytes) + " at least 1 MiB.");
  }
  const auto n = static_cast<size_t>(n_threads);
  const size_t part_bytes = bytes / n / kLineBytes * kLineBytes;
  ThreadPool pool(n_threads);
  const ThreadPool::PinnedCaller pinned(pool);
  std::vector<Arena> parts(n);
  for (Arena& part : parts) part = Arena(part_bytes);
  pool.run([&](int thread) {  // each page written by its reader: on its NUMA node, and not the system's page of zeros
    const Arena& part = parts[static_cast<size_t>(thread)];
    for (size_t at = 0; at < part.bytes(); at += kPageBytes) part.data()[at] = 1;
  });

  std::vector<uint64_t> sums(n);
  std::vector<double> pass_s;
  const double end = now_s() + seconds;
  do {
    const double start = now_s();
    pool.run([&](int thread) {
      const auto t = static_cast<size_t>(thread);
      sums[t] += sum_lines(parts[t]);
    });
    pass_s.push_back(now_s() - start);
  } while (now_s() < end);
  // The sums are used, so that no pass can be left out.
  volatile uint64_t sink = 0;
  for (const uint64_t s : sums) sink = sink + s;

  const auto middle = pass_s.begin() + static_cast<std::ptrdiff_t>(pass_s.size() / 2);
  std::nth_element(pass_s.begin(), middle, pass_s.end());
  return static_cast<double>(part_bytes * n) / *middle * 1e-9;
}

}  // namespace dipper
