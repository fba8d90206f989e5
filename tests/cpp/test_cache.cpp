// Selection and column cache against brute force: full sorts of (key, preference, index).
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "column_cache.hpp"
#include "errors.hpp"
#include "flash_reader.hpp"
#include "replay.hpp"
#include "selection.hpp"

using namespace dipper;
using Columns = std::vector<int32_t>;

namespace {

template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

template <class Key>
Columns brute_top_k(const std::vector<Key>& keys, int32_t k) {
  Columns order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return keys[a] > keys[b]; });
  order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

// k results between guards, so that a write past the k-th shows.
template <class Call>
Columns guarded(int32_t k, Call&& call) {
  Columns out(k + 1, -7);
  call(out.data());
  CHECK(out.back() == -7);
  out.pop_back();
  return out;
}

void test_n_selected() {
  CHECK(n_selected(0.5, 576) == 288 && n_selected(0.5, 3) == 2 && n_selected(1.0, 7) == 7 && n_selected(1e-9, 7) == 1);
  for (const double density : {0.0, -0.1, 1.01, std::nan("")}) {
    CHECK(contains(error_of([&] { n_selected(density, 8); }), "density is "));
  }
  CHECK(contains(error_of([] { n_selected(0.5, 0); }), "a region of 0 columns"));
}

void test_top_k_keys() {
  std::mt19937 random(1);
  SelectionScratch scratch;
  for (int round = 0; round < 4000; ++round) {
    const auto n = static_cast<int32_t>(1 + random() % (round % 50 ? 300 : 5000));
    // From all equal to all 32 bits, with and without zeros and a far outlier.
    const uint32_t mask = random() % 33 == 32 ? ~0u : (1u << random() % 32) - 1;
    const uint32_t offset = random() % 3 ? 0 : random();
    std::vector<uint32_t> keys(n);
    for (auto& key : keys) key = (random() & mask) + offset;
    if (random() % 4 == 0) keys[random() % n] = ~0u;
    if (random() % 4 == 0) {
      for (int i = 0; i < n / 2; ++i) keys[random() % n] = 0;
    }
    const auto k = static_cast<int32_t>(random() % (n + 1));
    CHECK(guarded(k, [&](int32_t* out) { top_k_keys(keys, k, scratch, out); }) == brute_top_k(keys, k));
  }
}

void test_top_k() {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  SelectionScratch scratch;
  for (int round = 0; round < 2000; ++round) {
    const auto n = static_cast<int32_t>(1 + random() % 700);
    const bool rounded = random() % 2;  // to bf16: ties at the threshold
    const float gamma = std::vector{1.0f, 0.5f, 0.2f, 1e-30f}[random() % 4];
    std::vector<float> scores(n), scaled(n), factors(n, 1.0f);
    std::vector<uint8_t> cached(n);
    const bool weighted = random() % 2;
    for (int32_t i = 0; i < n; ++i) {
      if (weighted)
        factors[i] = std::exp(4 * normal(random)) * (random() % 100 ? 1.0f : 1e35f);  // some products are inf
      scores[i] = normal(random) * (random() % 100 ? 1.0f : 1e-35f);
      if (rounded) scores[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(scores[i]) & 0xffff0000u);
      if (random() % 200 == 0) scores[i] = std::numeric_limits<float>::infinity() * (random() % 2 ? 1 : -1);
      if (random() % 200 == 0) scores[i] = -0.0f;
      cached[i] = random() % 2;
      const float score = std::abs(scores[i]) * factors[i];
      scaled[i] = cached[i] ? score : gamma * score;
    }
    const auto k = static_cast<int32_t>(1 + random() % n);
    const uint8_t* flags = gamma == 1.0f && random() % 2 ? nullptr : cached.data();
    const float* given = weighted ? factors.data() : nullptr;
    CHECK(guarded(k, [&](int32_t* out) { top_k(scores, k, gamma, flags, scratch, out, given); }) ==
          brute_top_k(scaled, k));
  }
}

void test_top_k_errors() {
  SelectionScratch scratch;
  std::vector<float> scores(40, 1.0f);
  const std::vector<uint8_t> cached(40);
  Columns out(40);
  const auto error = [&](int32_t k, float gamma, const uint8_t* flags) {
    return error_of([&] { top_k(scores, k, gamma, flags, scratch, out.data()); });
  };
  CHECK(contains(error(0, 1.0f, nullptr), "k is 0 for 40 columns"));
  CHECK(contains(error(41, 1.0f, nullptr), "k is 41 for 40 columns"));
  CHECK(contains(error(4, 0.0f, cached.data()), "gamma is 0.0"));
  CHECK(contains(error(4, 1.5f, cached.data()), "gamma is 1.5"));
  CHECK(contains(error(4, NAN, cached.data()), "gamma is nan"));
  CHECK(contains(error(4, 0.5f, nullptr), "no cache is given"));
  scores[17] = -std::numeric_limits<float>::quiet_NaN();
  scores[30] = NAN;
  CHECK(contains(error(4, 1.0f, nullptr), "score of column 17 is NaN"));
  CHECK(contains(error(4, 0.5f, cached.data()), "score of column 17 is NaN"));
  std::vector<float> rows(3 * 40, 1.0f);
  rows[2 * 40 + 5] = NAN;
  CHECK(contains(error_of([&] {
                   std::vector<int32_t> masks(3 * 4);
                   scan(rows.data(), 3, 40, 4, 1.0f, nullptr, true, masks.data(), nullptr);
                 }),
                 "score of column 5 at token 2 is NaN"));
}

// For every column of every mask the first later mask that has it.
std::vector<Columns> brute_next_uses(const std::vector<Columns>& masks) {
  std::vector<Columns> all;
  for (size_t t = 0; t < masks.size(); ++t) {
    Columns next;
    for (const int32_t c : masks[t]) {
      size_t u = t + 1;
      while (u < masks.size() && !std::ranges::binary_search(masks[u], c)) ++u;
      next.push_back(u < masks.size() ? static_cast<int32_t>(u) : kNeverUsed);
    }
    all.push_back(next);
  }
  return all;
}

// The definition, by full sorts. Belady's value: minus the next use, -1e9 where that never comes, less still where no
// next use was told.
struct BruteCache {
  int32_t n, capacity;
  CachePolicy policy;
  float decay;
  std::vector<float> value;
  std::vector<uint8_t> cached;
  Columns slots;
  int32_t token = 0;

  struct Result {
    int32_t n_hits = 0;
    Columns misses;
    std::vector<Admission> admissions;
  };

  Result step(const Columns& mask, const Columns& next_use) {
    Result result;
    ++token;
    if (policy == CachePolicy::kLfuDecay) {
      for (float& v : value) v = v * decay < 0x1p-100f ? 0 : v * decay;
    }
    std::vector<uint8_t> selected(n);
    for (size_t i = 0; i < mask.size(); ++i) {
      const int32_t c = mask[i];
      selected[c] = 1;
      value[c] = policy == CachePolicy::kLru      ? static_cast<float>(token)
                 : policy != CachePolicy::kBelady ? value[c] + 1
                 : next_use[i] == kNeverUsed      ? -1e9f
                                                  : -static_cast<float>(next_use[i]);
      if (cached[c]) {
        ++result.n_hits;
      } else {
        result.misses.push_back(c);
      }
    }
    if (policy == CachePolicy::kStatic) return result;
    Columns order;
    for (int32_t c = 0; c < n; ++c) {
      if (cached[c] || selected[c]) order.push_back(c);
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return value[a] != value[b] ? value[a] > value[b] : cached[a] > cached[b];
    });
    if (order.size() > static_cast<size_t>(capacity)) order.resize(capacity);
    std::vector<uint8_t> kept(n);
    for (int32_t c : order) kept[c] = 1;

    Columns owner(capacity, -1), room;
    for (int32_t c = 0; c < n; ++c) {
      if (cached[c]) owner[slots[c]] = c;
    }
    for (int32_t s = 0; s < capacity; ++s) {
      if (owner[s] < 0) room.push_back(s);
    }
    for (int32_t s = 0; s < capacity; ++s) {
      if (owner[s] >= 0 && !kept[owner[s]]) room.push_back(s);
    }
    size_t next = 0;
    for (int32_t c = 0; c < n; ++c) {
      if (!kept[c] || cached[c]) continue;
      const int32_t slot = room[next++];
      result.admissions.push_back({c, slot, owner[slot]});
    }
    for (const auto& [column, slot, evicted] : result.admissions) {
      if (evicted >= 0) {
        cached[evicted] = 0;
        slots[evicted] = -1;
      }
      cached[column] = 1;
      slots[column] = slot;
    }
    return result;
  }
};

Columns random_mask(std::mt19937& random, int32_t n) {
  Columns mask;
  const uint32_t share = 1 + random() % 8;
  for (int32_t c = 0; c < n; ++c) {
    if (random() % 10 < share + (c % 3 == 0)) mask.push_back(c);
  }
  return mask;
}

void test_cache_against_definition() {
  std::mt19937 random(3);
  for (const auto policy :
       {CachePolicy::kLru, CachePolicy::kLfu, CachePolicy::kLfuDecay, CachePolicy::kStatic, CachePolicy::kBelady}) {
    const bool belady = policy == CachePolicy::kBelady;
    for (int round = 0; round < 120; ++round) {
      const auto n = static_cast<int32_t>(1 + random() % 200);
      const int32_t capacity = round == 0 ? 0 : round == 1 ? n : static_cast<int32_t>(random() % (n + 1));
      const float decay = round % 2 ? 0.9f : 0.05f;
      ColumnCache cache(n, capacity, policy, decay);
      BruteCache brute{n, capacity, policy, decay, std::vector<float>(n), std::vector<uint8_t>(n), Columns(n, -1)};
      if (belady) std::ranges::fill(brute.value, -2e9f);
      std::vector<Columns> masks(60);
      for (Columns& mask : masks) mask = random_mask(random, n);
      const std::vector<Columns> next_uses = brute_next_uses(masks);
      uint64_t hits = 0, misses = 0, admissions = 0, evictions = 0;
      for (int token = 0; token < 60; ++token) {
        if (token == 5 && round % 3 == 0) {  // columns without history
          Columns pinned;
          for (int32_t c = n - capacity / 2; c < n; ++c) pinned.push_back(c);
          cache.pin(pinned);
          std::fill(brute.cached.begin(), brute.cached.end(), 0);
          std::fill(brute.slots.begin(), brute.slots.end(), -1);
          for (size_t s = 0; s < pinned.size(); ++s) {
            brute.cached[pinned[s]] = 1;
            brute.slots[pinned[s]] = static_cast<int32_t>(s);
          }
        }
        const Columns &mask = masks[token], &next_use = next_uses[token];
        const bool counted = token % 4 != 0;
        const auto expected = brute.step(mask, next_use);
        const auto& step = cache.step(mask, counted, belady ? next_use : std::span<const int32_t>{});
        CHECK(step.n_hits == expected.n_hits);
        CHECK(std::ranges::equal(step.misses, expected.misses));
        CHECK(std::ranges::equal(step.admissions, expected.admissions, [](const auto& a, const auto& b) {
          return a.column == b.column && a.slot == b.slot && a.evicted == b.evicted;
        }));
        CHECK(std::equal(brute.cached.begin(), brute.cached.end(), cache.cached()));
        CHECK(std::ranges::equal(cache.slots(), brute.slots));
        for (int32_t s = 0; s < cache.size(); ++s) CHECK(cache.slot_of(cache.columns_by_slot()[s]) == s);
        if (!counted) continue;
        hits += expected.n_hits;
        misses += expected.misses.size();
        admissions += expected.admissions.size();
        for (const auto& a : expected.admissions) evictions += a.evicted >= 0;
      }
      CHECK(cache.hits() == hits && cache.misses() == misses);
      CHECK(cache.admissions() == admissions && cache.evictions() == evictions);
    }
  }
}

void test_history_limits() {
  // LRU: token numbers that move down change nothing as long as no cached column goes unused for half of the limit.
  ColumnCache limited(8, 4, CachePolicy::kLru, 1.0f, 40), plain(8, 4, CachePolicy::kLru);
  std::mt19937 random(4);
  for (int token = 0; token < 500; ++token) {
    const Columns mask = random_mask(random, 8);
    limited.step(mask);
    plain.step(mask);
    CHECK(std::equal(plain.cached(), plain.cached() + 8, limited.cached()));
  }
  // A column older than half of the limit is just old: it leaves first.
  ColumnCache old(3, 2, CachePolicy::kLru, 1.0f, 4);
  old.step(Columns{0});
  for (int i = 0; i < 10; ++i) old.step(Columns{1});
  old.step(Columns{2});
  CHECK(old.slot_of(0) == -1 && old.slot_of(1) == 1 && old.slot_of(2) == 0);
  // LFU: at the limit of 3 both columns count the same, so the cached one stays.
  ColumnCache lfu(2, 1, CachePolicy::kLfu, 1.0f, 3);
  for (int i = 0; i < 3; ++i) lfu.step(Columns{1});
  for (int i = 0; i < 9; ++i) lfu.step(Columns{0});
  CHECK(lfu.slot_of(1) == 0 && lfu.slot_of(0) == -1);
  CHECK(contains(error_of([] { ColumnCache(2, 1, CachePolicy::kLfu, 1.0f, 1); }), "history limit is 1"));
}

void test_decay_ends() {
  // Column 1 was used once, column 0 never. At decay 0.5 the use counts 2^-100 after 100 more tokens and outranks none;
  // one token later it is 0, and of equals the lower column stays.
  for (const int32_t idle : {99, 100}) {
    ColumnCache cache(3, 2, CachePolicy::kLfuDecay, 0.5f);
    cache.pin(Columns{0, 1});
    cache.step(Columns{1});
    for (int32_t i = 0; i < idle; ++i) cache.step(Columns{});
    CHECK(cache.size() == 2);  // nothing leaves without an admission
    cache.step(Columns{2});
    CHECK(cache.slot_of(2) >= 0 && cache.slot_of(idle == 99 ? 0 : 1) == -1);
  }
}

void test_cache_errors() {
  CHECK(cache_policy("lfu-decay") == CachePolicy::kLfuDecay);
  CHECK(std::string(cache_policy_name(CachePolicy::kStatic)) == "static");
  CHECK(contains(error_of([] { cache_policy("fifo"); }),
                 "'fifo' is unknown: use one of lru, lfu, lfu-decay, static, belady"));
  CHECK(cache_admission("always") == CacheAdmission::kAlways && cache_admission("best") == CacheAdmission::kBest);
  CHECK(error_of([] { cache_admission("maybe"); }) == "cache admission 'maybe' is unknown: use best or always");
  CHECK(contains(error_of([] { ColumnCache(0, 0, CachePolicy::kLru); }), "0 columns"));
  CHECK(contains(error_of([] { ColumnCache(4, 5, CachePolicy::kLru); }), "capacity is 5 for a region of 4"));
  CHECK(contains(error_of([] { ColumnCache(4, -1, CachePolicy::kLru); }), "capacity is -1"));
  CHECK(contains(error_of([] { ColumnCache(4, 2, CachePolicy::kLfuDecay, 0.0f); }), "decay is 0.0"));
  CHECK(contains(error_of([] { ColumnCache(4, 2, CachePolicy::kLfuDecay, NAN); }), "decay is nan"));
  ColumnCache cache(4, 2, CachePolicy::kStatic);
  CHECK(contains(error_of([&] { cache.pin(Columns{0, 1, 2}); }), "pin of 3 columns into a cache of 2"));
  CHECK(contains(error_of([&] { cache.pin(Columns{1, 1}); }), "pinned column 1 at position 1"));
  CHECK(contains(error_of([&] { cache.pin(Columns{1, 4}); }), "pinned column 4 at position 1"));
  cache.pin(Columns{1, 3});
  cache.step(Columns{0, 3});
  CHECK(cache.hits() == 1 && cache.misses() == 1 && cache.admissions() == 0 && cache.slot_of(3) == 1);
  cache.clear();
  CHECK(cache.hits() == 0 && cache.misses() == 0 && cache.size() == 0 && cache.slot_of(3) == -1);
}

void test_scan_is_a_loop() {
  constexpr int32_t kTokens = 50, kN = 64, kK = 20;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> scores(kTokens * kN), factors(kN);
  for (float& s : scores) s = normal(random);
  for (float& f : factors) f = std::exp(normal(random));
  ColumnCache scanned(kN, 24, CachePolicy::kLfu), looped(kN, 24, CachePolicy::kLfu);
  Columns masks(kTokens * kK), hits(kTokens);
  scan(scores.data(), kTokens, kN, kK, 0.3f, &scanned, true, masks.data(), hits.data(), factors.data());
  SelectionScratch scratch;
  for (int32_t t = 0; t < kTokens; ++t) {
    Columns mask(kK);
    top_k({scores.data() + t * kN, kN}, kK, 0.3f, looped.cached(), scratch, mask.data(), factors.data());
    CHECK(std::equal(mask.begin(), mask.end(), masks.begin() + t * kK));
    CHECK(looped.step(mask).n_hits == hits[t]);
  }
  CHECK(scanned.hits() == looped.hits() && scanned.hits() > 0);
  ColumnCache other(kN + 1, 24, CachePolicy::kLfu);
  CHECK(contains(error_of([&] { scan(scores.data(), 1, kN, kK, 0.3f, &other, true, masks.data(), nullptr); }),
                 "scores have 64 columns but the cache has 65"));
}

void test_next_uses() {
  std::mt19937 random(6);
  for (int round = 0; round < 200; ++round) {
    const auto n = static_cast<int32_t>(1 + random() % 30), k = static_cast<int32_t>(random() % (n + 1));
    const auto n_tokens = static_cast<int32_t>(random() % 12);
    std::vector<Columns> masks;
    Columns flat;
    for (int32_t t = 0; t < n_tokens; ++t) {
      std::vector<uint32_t> keys(n);
      for (uint32_t& key : keys) key = random();
      masks.push_back(brute_top_k(keys, k));
      flat.insert(flat.end(), masks.back().begin(), masks.back().end());
    }
    Columns expected;
    for (const Columns& row : brute_next_uses(masks)) expected.insert(expected.end(), row.begin(), row.end());
    CHECK(guarded(n_tokens * k, [&](int32_t* out) { next_uses(flat, n_tokens, k, n, out); }) == expected);
  }
}

void test_belady() {
  // Columns 0, 1, 2; one slot. 1 comes sooner than 0 and replaces it; 0 returns; 2 never comes again and stays out.
  ColumnCache cache(3, 1, CachePolicy::kBelady);
  const std::vector<Columns> masks{{0}, {1}, {1}, {0}, {2}, {0}};
  const std::vector<Columns> next_uses = brute_next_uses(masks);
  CHECK(next_uses == (std::vector<Columns>{{3}, {2}, {-1}, {5}, {-1}, {-1}}));
  Columns cached;
  for (size_t t = 0; t < masks.size(); ++t) {
    cache.step(masks[t], true, next_uses[t]);
    cached.push_back(cache.columns_by_slot()[0]);
  }
  CHECK(cached == (Columns{0, 1, 1, 0, 0, 0}));
  CHECK(cache.hits() == 2 && cache.misses() == 4 && cache.evictions() == 2 && cache.admissions() == 3);
  // A next use beyond what a history holds is one that never comes: the cached column stays.
  ColumnCache limited(2, 1, CachePolicy::kBelady, 1.0f, 10);
  limited.step(Columns{0}, true, Columns{kNeverUsed});
  limited.step(Columns{1}, true, Columns{9});
  CHECK(limited.slot_of(0) == 0);
  limited.step(Columns{1}, true, Columns{8});
  CHECK(limited.slot_of(1) == 0);

  const std::string told = " columns for a mask of 2: it needs each; replay recorded masks, or choose another policy";
  CHECK(error_of([&] { cache.step(Columns{0, 1}); }) == "belady was told the next use of 0" + told);
  CHECK(error_of([&] { cache.step(Columns{0, 1}, true, Columns{3}); }) == "belady was told the next use of 1" + told);
  CHECK(cache.hits() == 2 && cache.misses() == 4 && cache.slot_of(0) == 0);
}

ColumnCache textbook(CachePolicy policy, uint32_t history_limit = ColumnCache::kHistoryLimit) {
  return {4, 2, policy, 0.5f, history_limit, CacheAdmission::kAlways};
}

// What each of these single accesses evicts: a column, -1 for none, -2 for a hit.
Columns evictions_of(ColumnCache cache, const Columns& columns) {
  std::vector<Columns> masks;
  for (const int32_t c : columns) masks.push_back({c});
  const std::vector<Columns> next_uses = brute_next_uses(masks);
  Columns out;
  for (size_t t = 0; t < masks.size(); ++t) {
    const CacheStep& step = cache.step(masks[t], true, next_uses[t]);
    CHECK(step.admissions.size() == 1u - step.n_hits);  // every miss enters
    out.push_back(step.n_hits ? -2 : step.admissions[0].evicted);
    CHECK(cache.slot_of(columns[t]) >= 0);
  }
  return out;
}

void test_admission_always() {
  CHECK(evictions_of(textbook(CachePolicy::kLru), {0, 1, 0, 2, 1}) == (Columns{-1, -1, -2, 1, 0}));
  // Column 0 is used twice. Of equals the older leaves; what left has no count when it comes back.
  CHECK(evictions_of(textbook(CachePolicy::kLfu), {0, 0, 1, 2, 1, 3}) == (Columns{-1, -2, -1, 1, 2, 1}));
  // Decayed, 0's uses count 0.375 against 1's 1 at token 3.
  CHECK(evictions_of(textbook(CachePolicy::kLfuDecay), {0, 0, 3, 1, 2}) == (Columns{-1, -2, -1, 0, 3}));
  // 0 comes back last; then neither 1 nor 2 comes again, and 2 is older.
  CHECK(evictions_of(textbook(CachePolicy::kBelady), {0, 1, 2, 1, 0}) == (Columns{-1, -1, 0, -2, 2}));
  // Token numbers that move down keep the order of age.
  const Columns long_trace{0, 1, 0, 2, 1, 3, 0, 2, 1, 0, 3, 2, 0, 1, 2, 3, 3, 0, 1};
  for (const auto policy : {CachePolicy::kLru, CachePolicy::kLfu}) {
    CHECK(evictions_of(textbook(policy, 16), long_trace) == evictions_of(textbook(policy), long_trace));
  }
  ColumnCache cache = textbook(CachePolicy::kLru);
  CHECK(error_of([&] { cache.step(Columns{0, 1}); }) ==
        "a mask of 2 columns under admission 'always': it takes one column a step");
  CHECK(cache.size() == 0 && cache.misses() == 0);
  cache.step(Columns{});
  cache.step(Columns{3});
  cache.clear();
  CHECK(evictions_of(cache, {0, 1, 2}) == (Columns{-1, -1, 0}));
}

struct Counts {
  explicit Counts(size_t n) : hits(n), admissions(n), reads(n), flash_bytes(n) {}
  Traffic traffic() { return {hits.data(), admissions.data(), reads.data(), flash_bytes.data()}; }
  bool operator==(const Counts&) const = default;
  Columns hits, admissions, reads;
  std::vector<int64_t> flash_bytes;
};

void count(Counts& counts, int32_t t, const CacheStep& step, const RegionLayout& layout) {
  std::vector<uint64_t> offsets;
  ReadPlan plan;
  plan_records(layout.offset, layout.record_bytes, step.misses, layout.alignment, nullptr, offsets, plan);
  counts.hits[t] = step.n_hits;
  counts.admissions[t] = static_cast<int32_t>(step.admissions.size());
  counts.reads[t] = static_cast<int32_t>(plan.ranges.size());
  counts.flash_bytes[t] = 0;
  for (const ReadRange& range : plan.ranges) counts.flash_bytes[t] += range.bytes;
}

void test_replay() {
  constexpr int32_t kTokens = 40, kN = 200, kK = 60, kCapacity = 70;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> scores(kTokens * kN);
  for (float& s : scores) s = normal(random);
  Columns masks(kTokens * kK), next(kTokens * kK);
  scan(scores.data(), kTokens, kN, kK, 1.0f, nullptr, true, masks.data(), nullptr);
  next_uses(masks, kTokens, kK, kN, next.data());
  for (const RegionLayout layout : {RegionLayout{8192, 700, 4096}, RegionLayout{1 << 20, 5000, 512},
                                    RegionLayout{0, 300'000, 4096}, RegionLayout{64, 64, 1}}) {
    for (const auto policy : {CachePolicy::kLru, CachePolicy::kLfu, CachePolicy::kBelady}) {
      const bool belady = policy == CachePolicy::kBelady;
      ColumnCache replayed(kN, kCapacity, policy), looped(kN, kCapacity, policy);
      Counts found(kTokens), expected(kTokens);
      const std::span<const int32_t> known = belady ? next : std::span<const int32_t>{};
      replay_masks(masks, kTokens, kK, known, layout, replayed, true, found.traffic());
      for (int32_t t = 0; t < kTokens; ++t) {
        const std::span<const int32_t> mask(masks.data() + t * kK, kK);
        count(expected, t, looped.step(mask, true, belady ? known.subspan(t * kK, kK) : known), layout);
      }
      CHECK(found == expected && replayed.hits() == looped.hits());
      CHECK(std::ranges::equal(replayed.slots(), looped.slots()));
      if (belady) continue;
      replayed.clear();
      looped.clear();
      Columns own(kTokens * kK), mask(kK);
      replay_scores(scores.data(), kTokens, kN, kK, 0.3f, layout, replayed, false, own.data(), found.traffic());
      SelectionScratch scratch;
      for (int32_t t = 0; t < kTokens; ++t) {
        top_k({scores.data() + t * kN, kN}, kK, 0.3f, looped.cached(), scratch, mask.data());
        CHECK(std::equal(mask.begin(), mask.end(), own.begin() + t * kK));
        count(expected, t, looped.step(mask), layout);
      }
      CHECK(found == expected && looped.hits() > 0 && replayed.hits() + replayed.misses() == 0);
      CHECK(std::ranges::equal(replayed.slots(), looped.slots()));
    }
  }
  ColumnCache cache(4, 2, CachePolicy::kLru);
  Counts counts(2);
  for (const Columns& bad : {Columns{0, 1, 2, 1}, Columns{0, 1, 1, 4}, Columns{0, 1, -1, 2}}) {
    const std::string error = error_of([&] { replay_masks(bad, 2, 2, {}, {0, 8, 8}, cache, true, counts.traffic()); });
    CHECK(contains(error, "the mask of token 1 holds column "));
    CHECK(contains(error, ": columns ascend, without repeats, from 0 to 3"));
  }
}

}  // namespace

int main() {
  test_n_selected();
  test_top_k_keys();
  test_top_k();
  test_top_k_errors();
  test_cache_against_definition();
  test_history_limits();
  test_decay_ends();
  test_cache_errors();
  test_scan_is_a_loop();
  test_next_uses();
  test_belady();
  test_admission_always();
  test_replay();
  return check_result();
}
