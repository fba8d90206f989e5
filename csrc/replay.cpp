#include "replay.hpp"

#include <string>
#include <vector>

#include "errors.hpp"
#include "flash_reader.hpp"
#include "selection.hpp"

namespace dipper {
namespace {

// Writes one token's row after another.
class Meter {
 public:
  Meter(const RegionLayout& layout, const Traffic& traffic) : layout_(layout), traffic_(traffic) {}

  void add(int32_t token, const CacheStep& step) {
    plan_records(layout_.offset, layout_.record_bytes, step.misses, layout_.alignment, nullptr, offsets_, plan_);
    traffic_.hits[token] = step.n_hits;
    traffic_.admissions[token] = static_cast<int32_t>(step.admissions.size());
    traffic_.reads[token] = static_cast<int32_t>(plan_.ranges.size());
    traffic_.flash_bytes[token] = static_cast<int64_t>(plan_.staging_bytes);
  }

 private:
  const RegionLayout& layout_;
  const Traffic& traffic_;
  std::vector<uint64_t> offsets_;
  ReadPlan plan_;
};

}  // namespace

void replay_masks(std::span<const int32_t> masks, int32_t n_tokens, int32_t k, std::span<const int32_t> next_use,
                  const RegionLayout& layout, ColumnCache& cache, bool counted, const Traffic& traffic) {
  Meter meter(layout, traffic);
  const auto width = static_cast<size_t>(k);
  for (int32_t t = 0; t < n_tokens; ++t) {
    const size_t row = static_cast<size_t>(t) * width;
    const std::span<const int32_t> mask = masks.subspan(row, width);
    for (size_t i = 0; i < width; ++i) {
      if (mask[i] < 0 || mask[i] >= cache.n_columns() || (i > 0 && mask[i] <= mask[i - 1])) {
        throw ConfigError("the mask of token " + std::to_string(t) + " holds column " + std::to_string(mask[i]) +
                          " at position " + std::to_string(i) + ": columns ascend, without repeats, from 0 to " +
                          std::to_string(cache.n_columns() - 1));
      }
    }
    const std::span<const int32_t> next = next_use.empty() ? next_use : next_use.subspan(row, width);
    meter.add(t, cache.step(mask, counted, next));
  }
}

void replay_scores(const float* scores, int32_t n_tokens, int32_t n, int32_t k, float gamma, const RegionLayout& layout,
                   ColumnCache& cache, bool counted, int32_t* masks, const Traffic& traffic) {
  Meter meter(layout, traffic);
  scan(scores, n_tokens, n, k, gamma, &cache, counted, masks, nullptr, nullptr,
       [&meter](int32_t token, std::span<const int32_t>, const CacheStep& step) { meter.add(token, step); });
}

}  // namespace dipper
