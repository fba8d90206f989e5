// Which columns a token uses: exact top-k and its cache-aware form (arXiv 2412.01380, DIP and DIP-CA).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace dipper {

class ColumnCache;
struct CacheStep;

// Scratch of the selection, reused from call to call so that decoding allocates nothing. One a thread.
struct SelectionScratch {
  std::vector<uint32_t> keys;        // [n] scores as integers of the same order
  std::vector<uint32_t> bins;        // histogram of the keys
  std::vector<uint32_t> candidates;  // keys of the bin that the threshold lies in
};

// Columns kept at a density in (0, 1]: floor(density * n + 1/2), in [1, n]. ConfigError outside.
int32_t n_selected(double density, int32_t n);

// Where the k largest keys end: keys above `key` are in, and those equal to it below index `tie_end`.
struct KeyCut {
  uint32_t key;
  int32_t tie_end;
  bool keeps(uint32_t k, int32_t index) const { return (k > key) | ((k == key) & (index < tie_end)); }  // no branch
};

// The cut of the k largest keys, ties to the lower index; 1 <= k <= keys.size(). A preference among ties other than the
// index belongs into the keys' lowest bit.
KeyCut top_k_cut(std::span<const uint32_t> keys, int32_t k, SelectionScratch& scratch);

// The k largest keys as ascending indices, ties to the lower index; 0 <= k <= keys.size(). out has room for k.
void top_k_keys(std::span<const uint32_t> keys, int32_t k, SelectionScratch& scratch, int32_t* out);

// Mask of a region: the k largest of |scores[i]|, times factors[i] (positive, finite; null: 1), times gamma where
// cached[i] (0 or 1) is 0, each product rounded to fp32; ascending indices, ties to the lower index. cached may be null
// when gamma == 1. Infinite scores rank; a NaN is a ConfigError ("score of column 17 is NaN ..."), and so are k outside
// [1, n], gamma outside (0, 1] and gamma < 1 without cached.
void top_k(std::span<const float> scores, int32_t k, float gamma, const uint8_t* cached, SelectionScratch& scratch,
           int32_t* out, const float* factors = nullptr);

// Which residuals of a split region a token fetches (docs/architecture.md, A token in planes).
struct Refinement {
  std::vector<float> scores;      // [n_units]
  std::vector<int32_t> read;      // units, ascending: what the reads bring, with cached ones that lie between
  std::vector<int32_t> fetched;   // units, ascending: those of them that are not cached
  std::vector<int32_t> demanded;  // units, ascending, fetched or cached: what the cache's step counts
  std::vector<uint32_t> keys;
  std::vector<float> gains;    // scores of units that are not cached
  std::vector<uint8_t> steps;  // of the search for runs: where the best choice for a unit comes from
  SelectionScratch scratch;
};
// Scores units by the error that their residuals remove: the sum over a unit's columns of (x_j norm_j)^2, in fp32, in
// the order in which they lie. x [n_columns], norm [n_columns], order [n_columns], cached [n_units].
//
// A read brings a run of neighbouring units and costs run_cost + the units in it, in the cost of one unit's bytes. A
// token may spend what n_fetch reads of one unit each cost, n_fetch (1 + run_cost), and takes the runs that remove most
// error for that: of sum(scores that are not cached) - price * cost the best choice, at the lowest price (of 12
// halvings of its logarithm) that keeps within it. With run_cost 0, or where every price gains less, the n_fetch best
// units that are not cached, ties to the lower; fewer where fewer are not cached. Demanded are units that are fetched
// or cached and worth a read of their own at that price; without a price, that score as well as the worst that is
// fetched. A NaN in x is a ConfigError.
void refine(const float* x, const float* norm, std::span<const int32_t> order, int32_t columns_per_unit,
            const uint8_t* cached, int32_t n_fetch, float run_cost, Refinement& out);

// Closed-loop masks of a whole sequence: for each of n_tokens rows of scores [n_tokens, n], select, then step the
// cache. masks [n_tokens, k]; hits [n_tokens] (may be null; zeros without a cache). cache may be null when gamma == 1.
// factors [n] as top_k.
// counted: false warms the cache without counting (prefill). Errors as top_k, naming the token; the cache then holds
// the state after the tokens before it. each: told every token's mask and cache step (not without a cache).
using EachStep = std::function<void(int32_t token, std::span<const int32_t> mask, const CacheStep& step)>;
void scan(const float* scores, int32_t n_tokens, int32_t n, int32_t k, float gamma, ColumnCache* cache, bool counted,
          int32_t* masks, int32_t* hits, const float* factors = nullptr, const EachStep& each = {});

}  // namespace dipper
