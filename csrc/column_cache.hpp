// The one cache: which columns of a region are in DRAM, and what each policy keeps. It knows slots, not bytes.
//
// One step per token. Hits are judged against the state before the token; then the policy keeps the best `capacity` of
// cached and selected columns together, so a miss may stay unadmitted. Nothing else ever leaves or enters.
//   lru        last token that used the column
//   lfu        count of uses, over all columns, cached or not
//   lfu-decay  the same, every count multiplied by `decay` (fp32, rounded) at each token before 1 is added for a use;
//              a product below 2^-100 becomes 0 (subnormal numbers would cost microseconds a token)
//   static     never admits; `pin` sets its contents
// Ties: cached first, then the lower column.
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

enum class CachePolicy { kLru, kLfu, kLfuDecay, kStatic };
CachePolicy cache_policy(
    const std::string& name);  // "lru" | "lfu" | "lfu-decay" | "static"; ConfigError names the known
const char* cache_policy_name(CachePolicy policy);

class ColumnCache {
 public:
  static constexpr uint32_t kHistoryLimit = 0x7fffffffu;

  // 0 <= capacity <= n_columns; decay in (0, 1], used by lfu-decay alone; ConfigError outside.
  // history_limit (at least 2): the largest use count, where counts saturate, and the largest LRU token number, at
  // which all of them move down by half of it and columns older than that become equally old. Tests lower it.
  ColumnCache(int32_t n_columns, int32_t capacity, CachePolicy policy, float decay = 0.99f,
              uint32_t history_limit = kHistoryLimit);

  // Memory that a cache allocates: per column history, flags, slot, keys and scratch; per slot column and admission.
  static uint64_t bytes(int32_t n_columns, int32_t capacity) {
    return 25ull * static_cast<uint64_t>(n_columns) + 20ull * static_cast<uint64_t>(capacity) + (8u << 10);
  }

  struct Admission {
    int32_t column;
    int32_t slot;     // where it goes
    int32_t evicted;  // the column that leaves this slot, -1 when the slot was free
  };
  // What one token did. Spans stay valid until the next call.
  struct Step {
    int32_t n_hits = 0;
    std::span<const int32_t> misses;        // selected and not cached before the token, ascending
    std::span<const Admission> admissions;  // columns that enter, ascending
  };
  // mask: ascending, unique, in [0, n_columns); may be longer than the capacity. Not checked here: the bindings do.
  // counted = false: a touch (prefill) that moves contents and history but no counter.
  const Step& step(std::span<const int32_t> mask, bool counted = true);

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
  void record_use(std::span<const int32_t> mask);
  void admit_best();
  KeyCut cut_of_best();
  void admit(int32_t column, int32_t slot, int32_t evicted);

  int32_t n_columns_, capacity_;
  CachePolicy policy_;
  float decay_;
  uint32_t history_limit_;

  int32_t size_ = 0;
  uint32_t token_ = 0;  // lru: number of the present token
  std::vector<uint32_t>
      history_;  // [n_columns] lru: last token of use, 0 never; lfu: uses; lfu-decay: bits of the fp32 count
  std::vector<uint8_t> cached_;     // [n_columns]
  std::vector<int32_t> slots_;      // [n_columns]
  std::vector<int32_t> column_in_;  // [capacity] column of a slot, the first size_ are valid

  Step step_;
  std::vector<int32_t> missed_, kept_;  // room for n_columns; kept: misses that enter
  std::vector<Admission> admitted_;     // room for n_columns
  std::vector<int32_t> freed_;          // slots
  std::vector<uint32_t> keys_;          // [n_columns]
  SelectionScratch scratch_;
  uint64_t hits_ = 0, misses_ = 0, evictions_ = 0, admissions_ = 0;
};

}  // namespace dipper
