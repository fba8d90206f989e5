// The one cache: which columns of a region are in DRAM, and what each policy keeps. It knows slots, not bytes.
//
// One step per token. Hits are judged against the state before the token; then the policy keeps the best `capacity` of
// cached and selected columns together, so a miss may stay unadmitted. Nothing else ever leaves or enters.
//   lru        last token that used the column
//   lfu        count of uses, over all columns, cached or not
//   lfu-decay  the same, every count multiplied by `decay` (fp32) at each token before the use is added
//   static     never admits; `pin` sets its contents
// Ties: cached first, then the lower column.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "selection.hpp"

namespace dipper {

enum class CachePolicy { kLru, kLfu, kLfuDecay, kStatic };
CachePolicy cache_policy(const std::string& name);  // "lru" | "lfu" | "lfu-decay" | "static"; ConfigError names the known

class ColumnCache {
 public:
  // 0 <= capacity <= n_columns; decay in (0, 1], used by lfu-decay alone.
  ColumnCache(int32_t n_columns, int32_t capacity, CachePolicy policy, float decay = 0.99f);

  struct Admission {
    int32_t column;
    int32_t slot;     // where it goes
    int32_t evicted;  // the column that leaves this slot, -1 when the slot was free
  };
  // What one token did. Spans stay valid until the next call.
  struct Step {
    int32_t n_hits;
    std::span<const int32_t> misses;         // selected and not cached before the token, ascending
    std::span<const Admission> admissions;   // columns that enter, ascending
  };
  // mask: ascending, unique, in [0, n_columns). counted = false: a touch (prefill) that moves state but no counter.
  const Step& step(std::span<const int32_t> mask, bool counted = true);

  // Replaces the contents by these columns (at most capacity; ascending); slots 0, 1, ... in this order.
  void pin(std::span<const int32_t> columns);
  void clear();  // empty, history and counters forgotten

  int32_t n_columns() const;
  int32_t capacity() const;
  CachePolicy policy() const;
  int32_t size() const;                        // columns held
  const uint8_t* cached() const;               // [n_columns] 0 or 1
  int32_t slot_of(int32_t column) const;       // -1 when not cached
  std::span<const int32_t> slots() const;      // [n_columns] slot or -1

  uint64_t hits() const;
  uint64_t misses() const;
  uint64_t evictions() const;
  uint64_t admissions() const;
  void reset_counters();
};

}  // namespace dipper
