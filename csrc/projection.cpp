#include "projection.hpp"

#include <algorithm>

namespace dipper {

namespace {

constexpr int32_t kMinGroup = 16;
constexpr int32_t kSharedBlocks = 128;  // so many inputs are worth waking the threads for

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
  // Kernels for floats step along the integers, too, and leave them alone.
  if (is_float(grid.codes)) return {x_, integers_[0].q, stride, integers_[0].blocks};
  Integers& to = integers_[grid.group == kMaxGroup ? 0 : 1];
  if (!to.made) {
    const int32_t n_blocks = blocks_of(n_cols_, grid.group);
    if (n_tokens_ == 1) {
      pool_.share_out(n_blocks, kSharedBlocks, [&](int32_t first, int32_t last) {
        const int32_t column = first * grid.group;
        quantise_blocks(kernels_, x_ + column, std::min(n_cols_, last * grid.group) - column, grid.group, to.q + column,
                        to.blocks + first);
      });
    } else {
      pool_.share_out(n_tokens_, 2, [&](int32_t first, int32_t last) {
        for (int32_t t = first; t < last; ++t)
          quantise_blocks(kernels_, x_ + static_cast<int64_t>(t) * n_cols_, n_cols_, grid.group, to.q + t * stride,
                          to.blocks + t * n_blocks);
      });
    }
    to.made = true;
  }
  return {x_, to.q, stride, to.blocks};
}

void Projector::project(std::span<const Projection> projections) {
  int32_t n_halves = 0;
  bool in_halves = true;
  for (const Projection& p : projections) {
    inputs(p.weight.grid);  // before the threads ask for them
    n_halves += p.weight.n_halves();
    in_halves &= p.second != nullptr;
  }
  // Threads share rows, by half tiles; or, where those would not come out in whole tiles, the halves of the columns: a
  // tile shared by two threads is read twice, and products of many tokens go by whole tiles.
  const int n = pool_.size();
  const int n_sides = in_halves && n % 2 == 0 && n_halves % (2 * n) != 0 ? 2 : 1;
  pool_.run([&](int thread) {
    // One share of all projections' rows together: k and v of a small model have a tile each.
    const Share all = share(n_halves, thread / n_sides, n / n_sides);
    int32_t before = 0;
    for (const Projection& p : projections) {
      const WeightView& w = p.weight;
      int32_t first = std::clamp(all.first - before, 0, w.n_halves());
      int32_t last = std::clamp(all.last - before, 0, w.n_halves());
      before += w.n_halves();
      if (n_tokens_ > 1) {
        first = (first + 1) / 2 * 2;
        last = std::min(w.n_halves(), (last + 1) / 2 * 2);
      }
      if (first >= last) continue;
      const int32_t row = first * kHalfTileRows;
      const int32_t end = last * kHalfTileRows;
      const MatrixInputs in = inputs(w.grid);
      const auto sum = [&](BlockRange blocks, const float* start, float* out) {
        for (int32_t t = 0; t < n_tokens_; ++t) {
          float* y = out + t * p.stride;
          std::fill(y + row, y + end, 0.0f);
          if (start != nullptr) std::copy(start + row, start + std::min(end, p.n_start), y + row);
        }
        if (n_tokens_ == 1) {
          kernels_.gemv_tiled(w, in, blocks, first, last, out);
        } else {
          kernels_.gemm_tiled(w, in, blocks, n_tokens_, first / 2, (last + 1) / 2, out, p.stride);
        }
      };
      if (p.second == nullptr) {
        sum({0, w.n_blocks}, p.start, p.out);
        continue;
      }
      const int32_t split = std::min(p.split / w.grid.group, w.n_blocks);
      const int side = thread % n_sides;
      if (n_sides == 1 || side == 0) sum({0, split}, p.start, p.out);
      if (n_sides == 1 || side == 1) sum({split, w.n_blocks}, nullptr, p.second);
      if (n_sides == 2) continue;
      for (int32_t t = 0; t < n_tokens_; ++t)
        kernels_.add(p.second + t * p.stride + row, end - row, p.out + t * p.stride + row);
    }
  });
  if (n_sides == 1) return;
  pool_.share_out(n_tokens_, 2, [&](int32_t first, int32_t last) {
    for (const Projection& p : projections) {
      for (int32_t t = first; t < last; ++t)
        kernels_.add(p.second + t * p.stride, p.weight.n_rows, p.out + t * p.stride);
    }
  });
}

}  // namespace dipper
