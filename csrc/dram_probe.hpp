// How fast this machine reads DRAM: the ceiling of every memory-bound kernel.
#pragma once

#include <cstdint>

namespace dipper {

// Threads read disjoint parts of a buffer of `bytes` in step, again and again for at least `seconds`; returns the
// median pass in GB/s (1e9 bytes). Take `bytes` well above the last-level cache. ConfigError: n_threads outside [1,
// 1024], bytes < 1 MiB.
double dram_read_gbps(int n_threads, uint64_t bytes, double seconds = 0.4);

}  // namespace dipper
