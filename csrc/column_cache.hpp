// The one cache: which columns of a region are in DRAM, and what each policy keeps. It knows slots, not bytes.
//
// One step per token. Hits are judged against the state before the token; then the policy keeps the best `capacity` of
// cached and selected columns together, so a miss may stay unadmitted. Nothing else ever leaves or enters.
//   lru        last token that used the column
//   lfu        count of uses, over all columns, cached or not
//   lfu-decay  the same, every count multiplied by `decay` (fp32, rounded) at each token before 1 is added for a use;
//              a product below 2^-100 becomes 0 (subnormal numbers would cost microseconds a token)
//   static     never admits; `pin` sets its contents
//   belady     the token that uses the column next, told with each mask: the fewest misses that any policy of a region
//   can
//              have. For recorded masks only: where masks depend on the cache (gamma < 1), nobody knows the next use.
// Ties: cached first, then the lower column.
//
// That is admission `best`. Admission `always` is the textbook's, for comparison with other simulators: one column a
// step, every miss is admitted, the worst of the columns cached before leaves (among equals the least recently used),
// and uses are counted of cached columns only.
//
// Slots: columns admitted by one step, in ascending order, take the free slots, lowest first, then the slots that the
// step freed, lowest first. So while the cache fills, slots 0 .. size-1 are in use.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "selection.hpp"

namespace dipper {

enum class CachePolicy { kLru, kLfu, kLfuDecay, kStatic, kBelady };
// "lru" | "lfu" | "lfu-decay" | "static" | "belady"; ConfigError names the known.
CachePolicy cache_policy(const std::string& name);
const char* cache_policy_name(CachePolicy policy);

enum class CacheAdmission { kBest, kAlways };
CacheAdmission cache_admission(const std::string& name);  // "best" | "always"; ConfigError else

// A next use that never comes.
inline constexpr int32_t kNeverUsed = -1;
// For every selected column of masks [n_tokens, k] the next token whose mask has it, or kNeverUsed: out [n_tokens, k].
void next_uses(std::span<const int32_t> masks, int32_t n_tokens, int32_t k, int32_t n_columns, int32_t* out);

struct Admission {
  int32_t column;
  int32_t slot;     // where it goes
  int32_t evicted;  // the column that leaves this slot, -1 when the slot was free
};

// What one token did. Spans stay valid until the cache's next call.
struct CacheStep {
  int32_t n_hits = 0;
  std::span<const int32_t> misses;        // selected and not cached before the token, ascending
  std::span<const Admission> admissions;  // columns that enter, ascending
};

class ColumnCache {
 public:
  static constexpr uint32_t kHistoryLimit = 0x7fffffffu;

  // 0 <= capacity <= n_columns; decay in (0, 1], used by lfu-decay alone; ConfigError outside.
  // history_limit (at least 2): the largest use count, where counts saturate, and the largest LRU token number, at
  // which all of them move down by half of it and columns older than that become equally old. Tests lower it.
  ColumnCache(int32_t n_columns, int32_t capacity, CachePolicy policy, float decay = 0.99f,
              uint32_t history_limit = kHistoryLimit, CacheAdmission admission = CacheAdmission::kBest);

  // Memory that a cache allocates: per column history, flags, slot, keys and scratch; per slot column and admission.
  static uint64_t bytes(int32_t n_columns, int32_t capacity) {
    return 25ull * static_cast<uint64_t>(n_columns) + 20ull * static_cast<uint64_t>(capacity) + (8u << 10);
  }

  // mask: ascending, unique, in [0, n_columns); may be longer than the capacity. Not checked here: the bindings do.
  // counted = false: a touch (prefill) that moves contents and history but no counter.
  // next_use: belady alone, and then one a column of the mask: the token that uses it next, or kNeverUsed. ConfigError
  // where it is missing, and under admission `always` for a mask of more than one column.
  const CacheStep& step(std::span<const int32_t> mask, bool counted = true, std::span<const int32_t> next_use = {});

  // Replaces the contents by these columns (at most capacity; ascending, unique; ConfigError else); slots 0, 1, ... in
  // this order. History and counters stay.
  void pin(std::span<const int32_t> columns);
  void clear();  // empty, history and counters forgotten

  int32_t n_columns() const { return n_columns_; }
  int32_t capacity() const { return capacity_; }
  CachePolicy policy() const { return policy_; }
  int32_t size() const { return size_; }                            // columns held
  const uint8_t* cached() const { return cached_.data(); }          // [n_columns] 0 or 1
  int32_t slot_of(int32_t column) const { return slots_[column]; }  // -1 when not cached
  std::span<const int32_t> slots() const { return slots_; }         // [n_columns] slot or -1
  std::span<const int32_t> columns_by_slot() const { return {column_in_.data(), static_cast<size_t>(size_)}; }

  uint64_t hits() const { return hits_; }
  uint64_t misses() const { return misses_; }
  uint64_t evictions() const { return evictions_; }
  uint64_t admissions() const { return admissions_; }
  void reset_counters();

 private:
  void record_use(std::span<const int32_t> mask, std::span<const int32_t> next_use);
  void admit_best();
  void admit_always();
  KeyCut cut_of_best();
  void admit(int32_t column, int32_t slot, int32_t evicted);

  int32_t n_columns_, capacity_;
  CachePolicy policy_;
  float decay_;
  uint32_t history_limit_;
  CacheAdmission admission_;

  int32_t size_ = 0;
  uint32_t token_ = 0;  // lru, and admission `always`: number of the present token
  // [n_columns] the larger, the better kept. lru: last token of use, 0 never; lfu: uses; lfu-decay: bits of the fp32
  // count; belady: history_limit - next use, 1 where that never comes.
  std::vector<uint32_t> history_;
  std::vector<uint32_t> last_use_;  // [n_columns] admission `always` alone: settles ties
  std::vector<uint8_t> cached_;     // [n_columns]
  std::vector<int32_t> slots_;      // [n_columns]
  std::vector<int32_t> column_in_;  // [capacity] column of a slot, the first size_ are valid

  CacheStep step_;
  std::vector<int32_t> missed_, kept_;  // room for n_columns; kept: misses that enter
  std::vector<Admission> admitted_;     // room for n_columns
  std::vector<int32_t> freed_;          // slots
  std::vector<uint32_t> keys_;          // [n_columns]
  SelectionScratch scratch_;
  uint64_t hits_ = 0, misses_ = 0, evictions_ = 0, admissions_ = 0;
};

}  // namespace dipper
