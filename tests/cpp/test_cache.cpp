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

// The definition, by full sorts.
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

  Result step(const Columns& mask) {
    Result result;
    ++token;
    if (policy == CachePolicy::kLfuDecay) {
      for (float& v : value) v = v * decay < 0x1p-100f ? 0 : v * decay;
    }
    std::vector<uint8_t> selected(n);
    for (int32_t c : mask) {
      selected[c] = 1;
      value[c] = policy == CachePolicy::kLru ? static_cast<float>(token) : value[c] + 1;
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
  for (const auto policy : {CachePolicy::kLru, CachePolicy::kLfu, CachePolicy::kLfuDecay, CachePolicy::kStatic}) {
    for (int round = 0; round < 120; ++round) {
      const auto n = static_cast<int32_t>(1 + random() % 200);
      const int32_t capacity = round == 0 ? 0 : round == 1 ? n : static_cast<int32_t>(random() % (n + 1));
      const float decay = round % 2 ? 0.9f : 0.05f;
      ColumnCache cache(n, capacity, policy, decay);
      BruteCache brute{n, capacity, policy, decay, std::vector<float>(n), std::vector<uint8_t>(n), Columns(n, -1)};
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
        const Columns mask = random_mask(random, n);
        const bool counted = token % 4 != 0;
        const auto expected = brute.step(mask);
        const auto& step = cache.step(mask, counted);
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
  CHECK(contains(error_of([] { cache_policy("fifo"); }), "'fifo' is unknown: use one of lru, lfu, lfu-decay, static"));
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
  return check_result();
}
