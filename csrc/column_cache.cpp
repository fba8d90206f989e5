#include "column_cache.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "errors.hpp"

namespace dipper {
namespace {

constexpr std::pair<const char*, CachePolicy> kPolicies[] = {
    {"lru", CachePolicy::kLru},
    {"lfu", CachePolicy::kLfu},
    {"lfu-decay", CachePolicy::kLfuDecay},
    {"static", CachePolicy::kStatic},
};

constexpr float kSmallestCount = 0x1p-100f;

}  // namespace

CachePolicy cache_policy(const std::string& name) {
  std::string known;
  for (const auto& [policy_name, policy] : kPolicies) {
    if (name == policy_name) return policy;
    known += (known.empty() ? "" : ", ") + std::string(policy_name);
  }
  throw ConfigError("cache policy '" + name + "' is unknown: use one of " + known);
}

const char* cache_policy_name(CachePolicy policy) { return kPolicies[static_cast<size_t>(policy)].first; }

ColumnCache::ColumnCache(int32_t n_columns, int32_t capacity, CachePolicy policy, float decay, uint32_t history_limit)
    : n_columns_(n_columns), capacity_(capacity), policy_(policy), decay_(decay), history_limit_(history_limit) {
  if (n_columns < 1) {
    throw ConfigError("a cache of a region with " + std::to_string(n_columns) + " columns: a region has at least 1");
  }
  if (capacity < 0 || capacity > n_columns) {
    throw ConfigError("cache capacity is " + std::to_string(capacity) + " for a region of " +
                      std::to_string(n_columns) + " columns: it lies between 0 and all of them");
  }
  if (!(decay > 0.0f && decay <= 1.0f)) {
    throw ConfigError("cache decay is " + std::to_string(decay) +
                      ": it multiplies every use count at each token and lies in (0, 1]");
  }
  if (history_limit < 2 || history_limit > kHistoryLimit) {
    throw ConfigError("history limit is " + std::to_string(history_limit) + ": it lies between 2 and " +
                      std::to_string(kHistoryLimit));
  }
  const auto n = static_cast<size_t>(n_columns);
  history_.resize(n);
  cached_.resize(n);
  slots_.resize(n, -1);
  keys_.resize(n);
  missed_.resize(n);
  kept_.resize(n);
  column_in_.resize(static_cast<size_t>(capacity));
  freed_.resize(static_cast<size_t>(capacity));
  admitted_.reserve(static_cast<size_t>(capacity));
}

const ColumnCache::Step& ColumnCache::step(std::span<const int32_t> mask, bool counted) {
  size_t n_misses = 0;
  for (const int32_t column : mask) {
    missed_[n_misses] = column;
    n_misses += !cached_[column];
  }
  step_.n_hits = static_cast<int32_t>(mask.size() - n_misses);
  step_.misses = {missed_.data(), n_misses};
  record_use(mask);

  admitted_.clear();
  const int32_t size_before = size_;
  if (policy_ != CachePolicy::kStatic && capacity_ > 0 && n_misses > 0) admit_best();
  step_.admissions = admitted_;
  if (counted) {
    const auto n_filled = static_cast<size_t>(size_ - size_before);
    hits_ += mask.size() - n_misses;
    misses_ += n_misses;
    admissions_ += admitted_.size();
    evictions_ += admitted_.size() - n_filled;
  }
  return step_;
}

void ColumnCache::record_use(std::span<const int32_t> mask) {
  switch (policy_) {
    case CachePolicy::kLru:
      if (token_ == history_limit_) {
        const uint32_t half = history_limit_ / 2;
        for (uint32_t& last : history_) last = last > half ? last - half : 0;
        token_ -= half;
      }
      ++token_;
      for (const int32_t column : mask) history_[column] = token_;
      break;
    case CachePolicy::kLfu:
      for (const int32_t column : mask) history_[column] += history_[column] < history_limit_;
      break;
    case CachePolicy::kLfuDecay:
      for (uint32_t& bits : history_) {
        const float count = std::bit_cast<float>(bits) * decay_;
        bits = count < kSmallestCount ? 0 : std::bit_cast<uint32_t>(count);
      }
      for (const int32_t column : mask) {
        history_[column] = std::bit_cast<uint32_t>(std::bit_cast<float>(history_[column]) + 1.0f);
      }
      break;
    case CachePolicy::kStatic:
      break;
  }
}

void ColumnCache::admit_best() {
  const auto n_free = static_cast<size_t>(capacity_ - size_);
  if (step_.misses.size() <= n_free) {
    for (const int32_t column : step_.misses) admit(column, size_++, -1);
    return;
  }
  const KeyCut cut = cut_of_best();
  size_t n_freed = 0;
  for (int32_t slot = 0; slot < size_; ++slot) {
    const int32_t column = column_in_[slot];
    freed_[n_freed] = slot;
    n_freed += !cut.keeps(keys_[column], column);
  }
  size_t n_admitted = 0;
  for (const int32_t column : step_.misses) {
    kept_[n_admitted] = column;
    n_admitted += cut.keeps(keys_[column], column);
  }
  for (size_t i = 0; i < n_free; ++i) admit(kept_[i], size_++, -1);
  for (size_t i = n_free; i < n_admitted; ++i) {
    const int32_t slot = freed_[i - n_free];
    admit(kept_[i], slot, column_in_[slot]);
  }
}

// The best `capacity` of cached and missed columns. The lowest bit of a key prefers the cached among equals; whatever
// is neither has key 0, below all others: a missed column has a history, a cached one the lowest bit.
KeyCut ColumnCache::cut_of_best() {
  for (int32_t column = 0; column < n_columns_; ++column) {
    keys_[column] = (history_[column] << 1 | 1u) & (0u - cached_[column]);
  }
  for (const int32_t column : step_.misses) keys_[column] = history_[column] << 1;
  return top_k_cut(keys_, capacity_, scratch_);
}

void ColumnCache::admit(int32_t column, int32_t slot, int32_t evicted) {
  if (evicted >= 0) {
    cached_[evicted] = 0;
    slots_[evicted] = -1;
  }
  cached_[column] = 1;
  slots_[column] = slot;
  column_in_[slot] = column;
  admitted_.push_back({column, slot, evicted});
}

void ColumnCache::pin(std::span<const int32_t> columns) {
  if (columns.size() > static_cast<size_t>(capacity_)) {
    throw ConfigError("pin of " + std::to_string(columns.size()) + " columns into a cache of " +
                      std::to_string(capacity_) + ": pin at most the capacity");
  }
  for (size_t i = 0; i < columns.size(); ++i) {
    if (columns[i] < 0 || columns[i] >= n_columns_ || (i > 0 && columns[i] <= columns[i - 1])) {
      throw ConfigError("pinned column " + std::to_string(columns[i]) + " at position " + std::to_string(i) +
                        ": columns ascend, without repeats, from 0 to " + std::to_string(n_columns_ - 1));
    }
  }
  std::fill(cached_.begin(), cached_.end(), 0);
  std::fill(slots_.begin(), slots_.end(), -1);
  std::copy(columns.begin(), columns.end(), column_in_.begin());
  size_ = static_cast<int32_t>(columns.size());
  for (int32_t slot = 0; slot < size_; ++slot) {
    cached_[columns[slot]] = 1;
    slots_[columns[slot]] = slot;
  }
}

void ColumnCache::clear() {
  pin({});
  std::fill(history_.begin(), history_.end(), 0);
  token_ = 0;
  reset_counters();
}

void ColumnCache::reset_counters() { hits_ = misses_ = evictions_ = admissions_ = 0; }

}  // namespace dipper
