#include "selection.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <string>

#include "column_cache.hpp"
#include "errors.hpp"

namespace dipper {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;  // bits of +inf; the bits of |NaN| lie above

// Index behind the nth (1-based) key equal to `key`.
int32_t end_of_tie(std::span<const uint32_t> keys, uint32_t key, int32_t nth) {
  constexpr size_t kBlock = 64;
  size_t i = 0;
  for (; i + kBlock <= keys.size(); i += kBlock) {
    int32_t ties = 0;
    for (size_t j = 0; j < kBlock; ++j) ties += keys[i + j] == key;
    if (ties >= nth) break;
    nth -= ties;
  }
  for (; nth > 0; ++i) nth -= keys[i] == key;
  return static_cast<int32_t>(i);
}

// Appends to out (which holds m of room for k) the indices in [begin, end) with keys >= least; returns the new m.
int32_t append(std::span<const uint32_t> keys, int32_t begin, int32_t end, uint32_t least, int32_t k, int32_t m,
               int32_t* out) {
  constexpr int32_t kBlock = 16;
  int32_t i = begin;
  // Branch-free: every index is written, a kept one moves the end. A block is entered only with room for all of it.
  for (; i + kBlock <= end && m + kBlock <= k; i += kBlock) {
    for (int32_t j = 0; j < kBlock; ++j) {
      out[m] = i + j;
      m += keys[i + j] >= least;
    }
  }
  for (; i < end && m < k; ++i) {
    out[m] = i;
    m += keys[i] >= least;
  }
  return m;
}

// Keys in [low, high], copied to out (room for all of them); few keys match, so blocks without a match are skipped.
size_t gather(std::span<const uint32_t> keys, uint32_t low, uint32_t high, uint32_t* out) {
  constexpr size_t kBlock = 32;
  const uint32_t width = high - low;
  size_t m = 0, i = 0;
  for (; i + kBlock <= keys.size(); i += kBlock) {
    uint32_t any = 0;
    for (size_t j = 0; j < kBlock; ++j) any |= keys[i + j] - low <= width;
    if (!any) continue;
    for (size_t j = i; j < i + kBlock; ++j) {
      if (keys[j] - low <= width) out[m++] = keys[j];
    }
  }
  for (; i < keys.size(); ++i) {
    if (keys[i] - low <= width) out[m++] = keys[i];
  }
  return m;
}

// |scores| (times factors, if kFactors) as integers of the same order, those not cached times gamma (if kAware); false
// when there is a NaN.
template <bool kFactors, bool kAware>
bool to_keys(std::span<const float> scores, const float* factors, float gamma, const uint8_t* cached, uint32_t* keys) {
  const size_t n = scores.size();
  const float* s = scores.data();
  int32_t nan = 0;  // its sign bit
  for (size_t i = 0; i < n; ++i) {
    uint32_t key = std::bit_cast<uint32_t>(s[i]) & 0x7fffffffu;
    nan |= static_cast<int32_t>(kInfinity - key);
    if constexpr (kFactors) key = std::bit_cast<uint32_t>(std::bit_cast<float>(key) * factors[i]);
    if constexpr (kAware) {
      const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(key) * gamma);
      const uint32_t keep = 0u - cached[i];  // a select by bits: vector code needs no branch and no blend
      key = scaled ^ ((scaled ^ key) & keep);
    }
    keys[i] = key;
  }
  return nan >= 0;
}

void check_selection(int32_t n, int32_t k, float gamma, bool has_cached) {
  if (k < 1 || k > n) {
    throw ConfigError("k is " + std::to_string(k) + " for " + std::to_string(n) +
                      " columns: a mask holds between 1 and all of them; use n_selected(density, n)");
  }
  if (!(gamma > 0.0f && gamma <= 1.0f)) {
    throw ConfigError("gamma is " + std::to_string(gamma) +
                      ": it scales the scores of columns that are not cached and lies in (0, 1]; 1 ignores the cache");
  }
  if (gamma < 1.0f && !has_cached) {
    throw ConfigError("gamma is " + std::to_string(gamma) +
                      " but no cache is given: pass the cache, or gamma = 1 for masks that ignore it");
  }
}

void select(std::span<const float> scores, const float* factors, int32_t k, float gamma, const uint8_t* cached,
            SelectionScratch& scratch, int32_t* out, std::optional<int32_t> token) {
  scratch.keys.resize(scores.size());
  const bool aware = gamma != 1.0f;
  const auto keys = factors != nullptr ? (aware ? to_keys<true, true> : to_keys<true, false>)
                                       : (aware ? to_keys<false, true> : to_keys<false, false>);
  if (!keys(scores, factors, gamma, cached, scratch.keys.data())) {
    const auto nan = std::find_if(scores.begin(), scores.end(), [](float s) { return std::isnan(s); });
    const std::string at = token ? " at token " + std::to_string(*token) : "";
    throw ConfigError("score of column " + std::to_string(nan - scores.begin()) + at +
                      " is NaN: it has no rank; look for an overflow or a damaged weight in the layers before");
  }
  top_k_keys(scratch.keys, k, scratch, out);
}

}  // namespace

int32_t n_selected(double density, int32_t n) {
  if (!(density > 0.0 && density <= 1.0)) {
    throw ConfigError("density is " + std::to_string(density) +
                      ": it is the share of columns used, above 0 and at most 1");
  }
  if (n < 1) throw ConfigError("a region of " + std::to_string(n) + " columns has no mask: it needs at least 1");
  return std::clamp(static_cast<int32_t>(std::floor(density * n + 0.5)), 1, n);
}

KeyCut top_k_cut(std::span<const uint32_t> keys, int32_t k, SelectionScratch& scratch) {
  const auto n = static_cast<int32_t>(keys.size());
  if (k == n) return {0, n};
  uint32_t high = 0, low_minus_1 = ~0u;
  for (const uint32_t key : keys) {
    high = std::max(high, key);
    low_minus_1 = std::min(low_minus_1, key - 1);  // a zero wraps to the largest
  }
  const uint32_t low = low_minus_1 + 1;  // 0 when all are

  // Bin 0 holds the zeros (columns out of question in the cache's keys), the others are equally wide between the
  // smallest and the largest key that is not zero: for the bits of floats that is nearly a logarithmic scale.
  const int n_bits = std::clamp(static_cast<int>(std::bit_width(keys.size())) - 1, 6, 11);
  const int shift = std::max(0, static_cast<int>(std::bit_width(high - low)) - n_bits);
  scratch.bins.assign((size_t{1} << n_bits) + 1, 0);
  uint32_t* bins = scratch.bins.data();
  for (const uint32_t key : keys) ++bins[((std::max(key, low) - low) >> shift) + (key >= low)];

  // need: how many keys the bin of the threshold gives.
  uint32_t bin = ((high - low) >> shift) + 1, need = static_cast<uint32_t>(k);
  while (bins[bin] < need) need -= bins[bin--];
  if (bin == 0) return {0, end_of_tie(keys, 0, static_cast<int32_t>(need))};
  const uint32_t bin_low = low + ((bin - 1) << shift);
  if (need == bins[bin]) return {bin_low, n};
  const uint32_t bin_high = bin_low + std::min((1u << shift) - 1, high - bin_low);
  if (scratch.candidates.size() < bins[bin]) scratch.candidates.resize(keys.size());
  uint32_t* candidates = scratch.candidates.data();
  const size_t n_candidates = gather(keys, bin_low, bin_high, candidates);
  std::nth_element(candidates, candidates + need - 1, candidates + n_candidates, std::greater<>());
  const uint32_t threshold = candidates[need - 1];
  uint32_t ties = 0;
  for (size_t i = 0; i < n_candidates; ++i) {
    need -= candidates[i] > threshold;
    ties += candidates[i] == threshold;
  }
  return {threshold, need == ties ? n : end_of_tie(keys, threshold, static_cast<int32_t>(need))};
}

void top_k_keys(std::span<const uint32_t> keys, int32_t k, SelectionScratch& scratch, int32_t* out) {
  if (k == 0) return;
  const KeyCut cut = top_k_cut(keys, k, scratch);
  const int32_t m = append(keys, 0, cut.tie_end, cut.key, k, 0, out);
  if (m < k) append(keys, cut.tie_end, static_cast<int32_t>(keys.size()), cut.key + 1, k, m, out);
}

void top_k(std::span<const float> scores, int32_t k, float gamma, const uint8_t* cached, SelectionScratch& scratch,
           int32_t* out, const float* factors) {
  check_selection(static_cast<int32_t>(scores.size()), k, gamma, cached != nullptr);
  select(scores, factors, k, gamma, cached, scratch, out, std::nullopt);
}

namespace {

// The price of runs is sought from that of the best single units over this factor to that times it.
constexpr double kPriceRange = 64.0;
constexpr int kPriceSteps = 12;

struct Runs {
  double cost = 0.0;
  double gain = 0.0;
};

// The choice of runs that maximises gain - price * cost, by dynamic programming over units: either outside of a run or
// in one. steps [n_units]: bit 0: the best way to be outside after this unit was in a run before it; bit 1: the best
// way to be in a run at it was in one before it.
template <bool kSteps>
Runs best_runs(std::span<const float> gains, double price, double run_cost, uint8_t* steps, bool* ends_in) {
  const double start = price * run_cost;
  double out_value = 0.0, in_value = -std::numeric_limits<double>::infinity();
  Runs out, in;
  for (size_t u = 0; u < gains.size(); ++u) {
    const double gain = gains[u];
    const double net = gain - price;
    const double started = out_value - start;
    const bool leaves = in_value > out_value;  // ends its run before this unit
    const bool stays = in_value >= started;
    const Runs before = stays ? in : Runs{out.cost + run_cost, out.gain};
    const double best = stays ? in_value : started;
    if (leaves) out = in;
    out_value = leaves ? in_value : out_value;
    in = {before.cost + 1.0, before.gain + gain};
    in_value = best + net;
    if constexpr (kSteps) steps[u] = static_cast<uint8_t>(leaves) | static_cast<uint8_t>(stays ? 2 : 0);
  }
  *ends_in = in_value > out_value;
  return *ends_in ? in : out;
}

// Replaces the n best single units, whose worst scores `least`, by better runs where there are some; returns from which
// score on units are demanded.
float choose_runs(const uint8_t* cached, int32_t n_fetch, float run_cost, float least, Refinement& out) {
  const size_t n_units = out.scores.size();
  const double budget = static_cast<double>(n_fetch) * (1.0 + run_cost);
  out.gains.resize(n_units);
  for (size_t u = 0; u < n_units; ++u)
    out.gains[u] = cached[u] ? 0.0f : std::min(out.scores[u], std::numeric_limits<float>::max());
  double single_gain = 0.0;
  for (const int32_t u : out.fetched) single_gain += out.gains[static_cast<size_t>(u)];
  const double single_price =
      static_cast<double>(std::min(least, std::numeric_limits<float>::max())) / (1.0 + run_cost);
  double low = single_price / kPriceRange, high = single_price * kPriceRange;
  double price = 0.0;  // the lowest that keeps within the budget; 0: none yet
  bool ends_in = false;
  for (int i = 0; i < kPriceSteps; ++i) {
    const double middle = std::sqrt(low * high);
    const Runs runs = best_runs<false>(out.gains, middle, run_cost, nullptr, &ends_in);
    if (runs.cost <= budget) {
      high = middle;
      if (runs.gain >= single_gain) price = middle;
    } else {
      low = middle;
    }
  }
  if (price == 0.0) return least;
  out.steps.resize(n_units);
  best_runs<true>(out.gains, price, run_cost, out.steps.data(), &ends_in);
  out.read.clear();
  bool in = ends_in;
  for (size_t u = n_units; u-- > 0;) {
    if (in) out.read.push_back(static_cast<int32_t>(u));
    in = (out.steps[u] & (in ? 2 : 1)) != 0;
  }
  std::reverse(out.read.begin(), out.read.end());
  out.fetched.clear();
  for (const int32_t u : out.read) {
    if (!cached[u]) out.fetched.push_back(u);
  }
  return static_cast<float>(price * (1.0 + run_cost));
}

}  // namespace

void refine(const float* x, const float* norm, std::span<const int32_t> order, int32_t columns_per_unit,
            const uint8_t* cached, int32_t n_fetch, float run_cost, Refinement& out) {
  const size_t n_columns = order.size();
  const auto per_unit = static_cast<size_t>(columns_per_unit);
  const size_t n_units = (n_columns + per_unit - 1) / per_unit;
  out.scores.resize(n_units);
  out.keys.resize(n_units);
  int32_t n_absent = 0;
  for (size_t u = 0; u < n_units; ++u) {
    float score = 0.0f;
    for (size_t i = u * per_unit; i < std::min(n_columns, (u + 1) * per_unit); ++i) {
      const float error = x[order[i]] * norm[order[i]];
      score += error * error;
    }
    if (std::isnan(score)) {
      throw ConfigError("an input of the columns of unit " + std::to_string(u) +
                        " is NaN: it has no rank; look for an overflow or a damaged weight in the layers before");
    }
    out.scores[u] = score;
    out.keys[u] = cached[u] ? 0 : std::bit_cast<uint32_t>(score) + 1;  // scores are not negative: bits rank as they do
    n_absent += cached[u] == 0;
  }
  const int32_t n = std::min(n_fetch, n_absent);
  out.fetched.resize(static_cast<size_t>(n));
  out.demanded.clear();
  out.read.clear();
  if (n == 0) return;
  top_k_keys(out.keys, n, out.scratch, out.fetched.data());
  float least = out.scores[static_cast<size_t>(out.fetched[0])];
  for (const int32_t u : out.fetched) least = std::min(least, out.scores[static_cast<size_t>(u)]);

  out.read = out.fetched;
  if (run_cost > 0.0f && n < n_absent) least = choose_runs(cached, n_fetch, run_cost, least, out);
  size_t next = 0;
  for (size_t u = 0; u < n_units; ++u) {
    const bool is_fetched = next < out.fetched.size() && out.fetched[next] == static_cast<int32_t>(u);
    next += is_fetched;
    if ((is_fetched || cached[u]) && out.scores[u] >= least) out.demanded.push_back(static_cast<int32_t>(u));
  }
}

void scan(const float* scores, int32_t n_tokens, int32_t n, int32_t k, float gamma, ColumnCache* cache, bool counted,
          int32_t* masks, int32_t* hits, const float* factors, const EachStep& each) {
  check_selection(n, k, gamma, cache != nullptr);
  if (cache && cache->n_columns() != n) {
    throw ConfigError("scores have " + std::to_string(n) + " columns but the cache has " +
                      std::to_string(cache->n_columns()) + ": use the cache of the same region");
  }
  SelectionScratch scratch;
  const auto width = static_cast<size_t>(n), kept = static_cast<size_t>(k);
  for (int32_t t = 0; t < n_tokens; ++t) {
    int32_t* mask = masks + t * kept;
    select({scores + t * width, width}, factors, k, gamma, cache ? cache->cached() : nullptr, scratch, mask, t);
    if (hits) hits[t] = 0;
    if (cache == nullptr) continue;
    const CacheStep& step = cache->step({mask, kept}, counted);
    if (hits) hits[t] = step.n_hits;
    if (each) each(t, {mask, kept}, step);
  }
}

}  // namespace dipper
