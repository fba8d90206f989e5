#include "column_cache.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "errors.hpp"

namespace dipper {
namespace {

constexpr std::pair<const char*, CachePolicy> kPolicies[] = {
    {"lru", CachePolicy::kLru},       {"lfu", CachePolicy::kLfu},       {"lfu-decay", CachePolicy::kLfuDecay},
    {"static", CachePolicy::kStatic}, {"belady", CachePolicy::kBelady},
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

CacheAdmission cache_admission(const std::string& name) {
  if (name == "best") return CacheAdmission::kBest;
  if (name == "always") return CacheAdmission::kAlways;
  throw ConfigError("cache admission '" + name + "' is unknown: use best or always");
}

void next_uses(std::span<const int32_t> masks, int32_t n_tokens, int32_t k, int32_t n_columns, int32_t* out) {
  std::vector<int32_t> next(static_cast<size_t>(n_columns), kNeverUsed);
  for (int32_t t = n_tokens - 1; t >= 0; --t) {
    const size_t row = static_cast<size_t>(t) * static_cast<size_t>(k);
    for (size_t i = row; i < row + static_cast<size_t>(k); ++i) {
      int32_t& of_column = next[static_cast<size_t>(masks[i])];
      out[i] = of_column;
      of_column = t;
    }
  }
}

ColumnCache::ColumnCache(int32_t n_columns, int32_t capacity, CachePolicy policy, float decay, uint32_t history_limit,
                         CacheAdmission admission)
    : n_columns_(n_columns),
      capacity_(capacity),
      policy_(policy),
      decay_(decay),
      history_limit_(history_limit),
      admission_(admission) {
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
  if (admission == CacheAdmission::kAlways) last_use_.resize(n);
  cached_.resize(n);
  slots_.resize(n, -1);
  keys_.resize(n);
  missed_.resize(n);
  kept_.resize(n);
  column_in_.resize(static_cast<size_t>(capacity));
  freed_.resize(static_cast<size_t>(capacity));
  admitted_.reserve(static_cast<size_t>(capacity));
}

const CacheStep& ColumnCache::step(std::span<const int32_t> mask, bool counted, std::span<const int32_t> next_use) {
  if (policy_ == CachePolicy::kBelady && next_use.size() != mask.size()) {
    throw ConfigError("belady was told the next use of " + std::to_string(next_use.size()) + " columns for a mask of " +
                      std::to_string(mask.size()) + ": it needs each; replay recorded masks, or choose another policy");
  }
  if (admission_ == CacheAdmission::kAlways && mask.size() > 1) {
    throw ConfigError("a mask of " + std::to_string(mask.size()) +
                      " columns under admission 'always': it takes one column a step");
  }
  size_t n_misses = 0;
  for (const int32_t column : mask) {
    missed_[n_misses] = column;
    n_misses += !cached_[column];
  }
  step_.n_hits = static_cast<int32_t>(mask.size() - n_misses);
  step_.misses = {missed_.data(), n_misses};
  record_use(mask, next_use);

  admitted_.clear();
  const int32_t size_before = size_;
  if (policy_ != CachePolicy::kStatic && capacity_ > 0 && n_misses > 0) {
    admission_ == CacheAdmission::kBest ? admit_best() : admit_always();
  }
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

void ColumnCache::record_use(std::span<const int32_t> mask, std::span<const int32_t> next_use) {
  if (token_ == history_limit_) {
    const uint32_t half = history_limit_ / 2;
    for (uint32_t& last : policy_ == CachePolicy::kLru ? history_ : last_use_) last = last > half ? last - half : 0;
    token_ -= half;
  }
  ++token_;
  if (admission_ == CacheAdmission::kAlways) {
    for (const int32_t column : mask) last_use_[column] = token_;
  }
  switch (policy_) {
    case CachePolicy::kLru:
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
    case CachePolicy::kBelady:
      for (size_t i = 0; i < mask.size(); ++i) {
        const auto token = static_cast<uint32_t>(next_use[i]);
        history_[mask[i]] = next_use[i] == kNeverUsed || token >= history_limit_ - 1 ? 1 : history_limit_ - token;
      }
      break;
    case CachePolicy::kStatic:
      break;
  }
}

void ColumnCache::admit_always() {
  const int32_t column = step_.misses.front();
  if (size_ < capacity_) return admit(column, size_++, -1);
  const auto worth = [this](int32_t c) { return std::pair(history_[c], last_use_[c]); };
  const auto worst =
      std::min_element(column_in_.begin(), column_in_.end(), [&](int32_t a, int32_t b) { return worth(a) < worth(b); });
  const int32_t evicted = *worst;
  if (policy_ != CachePolicy::kLru) history_[evicted] = 0;  // of columns that are not cached nothing is known
  admit(column, static_cast<int32_t>(worst - column_in_.begin()), evicted);
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
// is neither has key 0, below all others: a missed column has a history (belady gives it one even where its next use
// never comes), a cached one the lowest bit.
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
  std::fill(last_use_.begin(), last_use_.end(), 0);
  token_ = 0;
  reset_counters();
}

void ColumnCache::reset_counters() { hits_ = misses_ = evictions_ = admissions_ = 0; }

}  // namespace dipper
