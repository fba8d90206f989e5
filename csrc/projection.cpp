#include "projection.hpp"

#include <algorithm>

namespace dipper {

namespace {

constexpr int32_t kMinGroup = 16;

int32_t blocks_of(int32_t n_cols, int32_t group) { return (n_cols + group - 1) / group; }
uint64_t q_bytes(int32_t max_cols, int32_t max_tokens) {
  return static_cast<uint64_t>(max_tokens) * static_cast<uint64_t>(padded_inputs(max_cols)) * sizeof(int16_t);
}
uint64_t block_bytes(int32_t max_cols, int32_t max_tokens) {
  return static_cast<uint64_t>(max_tokens) * static_cast<uint64_t>(blocks_of(max_cols, kMinGroup)) *
         sizeof(BlockInputs);
}
uint64_t aligned(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

uint64_t Projector::bytes(int32_t max_cols, int32_t max_tokens) {
  return 2 * (aligned(q_bytes(max_cols, max_tokens)) + aligned(block_bytes(max_cols, max_tokens)));
}

Projector::Projector(const Kernels& kernels, ThreadPool& pool, int32_t max_cols, int32_t max_tokens)
    : kernels_(kernels), pool_(pool), memory_(bytes(max_cols, max_tokens)) {
  uint8_t* at = memory_.data();
  for (Integers& i : integers_) {
    i.q = reinterpret_cast<int16_t*>(at);
    at += aligned(q_bytes(max_cols, max_tokens));
    i.blocks = reinterpret_cast<BlockInputs*>(at);
    at += aligned(block_bytes(max_cols, max_tokens));
  }
}

void Projector::take(const float* x, int32_t n_cols, int32_t n_tokens) {
  x_ = x;
  n_cols_ = n_cols;
  n_tokens_ = n_tokens;
  for (Integers& i : integers_) i.made = false;
}

MatrixInputs Projector::inputs(const Grid& grid) {
  const int64_t stride = padded_inputs(n_cols_);
  if (is_float(grid.codes)) return {x_, nullptr, stride, nullptr};
  Integers& to = integers_[grid.group == kMaxGroup ? 0 : 1];
  if (!to.made) {
    const int32_t n_blocks = blocks_of(n_cols_, grid.group);
    const auto quantise = [&](int32_t first, int32_t last) {
      for (int32_t t = first; t < last; ++t)
        quantise_blocks(kernels_, x_ + static_cast<int64_t>(t) * n_cols_, n_cols_, grid.group, to.q + t * stride,
                        to.blocks + static_cast<int64_t>(t) * n_blocks);
    };
    if (n_tokens_ == 1) {
      quantise(0, 1);
    } else {
      pool_.run([&](int thread) {
        const Share tokens = share(n_tokens_, thread, pool_.size());
        quantise(tokens.first, tokens.last);
      });
    }
    to.made = true;
  }
  return {x_, to.q, stride, to.blocks};
}

void Projector::project(std::span<const Projection> projections) {
  int32_t n_halves = 0;
  for (const Projection& p : projections) {
    inputs(p.weight.grid);  // before the threads ask for them
    n_halves += p.weight.n_halves();
  }
  pool_.run([&](int thread) {
    // One share of all projections' rows together: k and v of a small model have a tile each.
    const Share all = share(n_halves, thread, pool_.size());
    int32_t before = 0;
    for (const Projection& p : projections) {
      const WeightView& w = p.weight;
      int32_t first = std::clamp(all.first - before, 0, w.n_halves());
      int32_t last = std::clamp(all.last - before, 0, w.n_halves());
      before += w.n_halves();
      if (n_tokens_ > 1) {  // products of many tokens go by whole tiles
        first = (first + 1) / 2 * 2;
        last = std::min(w.n_halves(), (last + 1) / 2 * 2);
      }
      if (first >= last) continue;
      const int32_t row = first * kHalfTileRows;
      const int32_t end = last * kHalfTileRows;
      const MatrixInputs in = inputs(w.grid);
      const auto multiply = [&](BlockRange blocks, float* out) {
        if (n_tokens_ == 1) {
          kernels_.gemv_tiled(w, in, blocks, first, last, out);
        } else {
          kernels_.gemm_tiled(w, in, blocks, n_tokens_, first / 2, (last + 1) / 2, out, p.stride);
        }
      };
      for (int32_t t = 0; t < n_tokens_; ++t) {
        float* y = p.out + t * p.stride;
        std::fill(y + row, y + end, 0.0f);
        if (p.start != nullptr) std::copy(p.start + row, p.start + std::min(end, p.n_start), y + row);
      }
      if (p.second == nullptr) {
        multiply({0, w.n_blocks}, p.out);
        continue;
      }
      const int32_t split = p.split / w.grid.group;
      for (int32_t t = 0; t < n_tokens_; ++t) std::fill_n(p.second + t * p.stride + row, end - row, 0.0f);
      multiply({0, split}, p.out);
      multiply({split, w.n_blocks}, p.second);
      for (int32_t t = 0; t < n_tokens_; ++t)
        kernels_.add(p.second + t * p.stride + row, end - row, p.out + t * p.stride + row);
    }
  });
}

}  // namespace dipper
