// Which columns a token uses: exact top-k and its cache-aware form (arXiv 2412.01380, DIP and DIP-CA).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace dipper {

class ColumnCache;

// Scratch of the selection, reused from call to call so that decoding allocates nothing.
struct SelectionScratch {
  std::vector<uint32_t> keys;
  std::vector<uint32_t> candidates;
};

// Columns kept at a density: floor(density * n + 1/2), in [1, n].
int32_t n_selected(double density, int32_t n);

// The k largest keys as ascending indices. Ties at the threshold go first to indices with prefer[i] != 0 (if prefer is
// given), then to the lower index. keys.size() >= k >= 0; out has room for k.
void top_k_keys(std::span<const uint32_t> keys, int32_t k, const uint8_t* prefer, SelectionScratch& scratch, int32_t* out);

// Mask of a region: the k largest of |scores[i]|, times gamma (fp32) where cached[i] == 0; ascending indices, ties to the
// lower index. cached may be null when gamma == 1. Throws ConfigError on a NaN score ("score of column 17 is NaN").
void top_k(std::span<const float> scores, int32_t k, float gamma, const uint8_t* cached, SelectionScratch& scratch,
           int32_t* out);

// Closed-loop masks of a whole sequence: for each of n_tokens rows of scores [n_tokens, n], select, then step the cache.
// masks [n_tokens, k]; hits [n_tokens] (may be null). cache may be null when gamma == 1.
// counted: false warms the cache without counting (prefill).
void scan(const float* scores, int32_t n_tokens, int32_t n, int32_t k, float gamma, ColumnCache* cache, bool counted,
          int32_t* masks, int32_t* hits);

}  // namespace dipper
