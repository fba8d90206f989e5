// What a sequence of masks does to one region, without weights: cache steps and the reads they would cause. The same
// cache, selection and read plans as the engine's, so the counts are the engine's too.
#pragma once

#include <cstdint>
#include <span>

#include "column_cache.hpp"

namespace dipper {

// Where a region's records lie on flash, and what a read of them is rounded to.
struct RegionLayout {
  uint64_t offset;
  uint32_t record_bytes;
  uint32_t alignment;  // a power of two
};

// By token, [n_tokens] each. Misses are selected - hits.
struct Traffic {
  int32_t* hits;
  int32_t* admissions;
  int32_t* reads;
  int64_t* flash_bytes;
};

// Recorded masks [n_tokens, k] (ascending rows) step through the cache. counted: false warms it without counting.
// next_use [n_tokens, k]: belady's, empty else. Valid for masks that do not depend on the cache: gamma = 1.
void replay_masks(std::span<const int32_t> masks, int32_t n_tokens, int32_t k, std::span<const int32_t> next_use,
                  const RegionLayout& layout, ColumnCache& cache, bool counted, const Traffic& traffic);

// The closed loop over scores [n_tokens, n]: `scan`, with its reads. masks [n_tokens, k] are written.
void replay_scores(const float* scores, int32_t n_tokens, int32_t n, int32_t k, float gamma, const RegionLayout& layout,
                   ColumnCache& cache, bool counted, int32_t* masks, const Traffic& traffic);

}  // namespace dipper
