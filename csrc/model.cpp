#include "model.hpp"

#include <cstring>

#include "half.hpp"

namespace dipper {

namespace {

uint32_t lane_bits(const uint8_t* lanes, int bytes, int lane) {
  uint32_t bits = 0;
  std::memcpy(&bits, lanes + bytes * lane, static_cast<size_t>(bytes));
  return bits;
}

// The value of one code of a tile: p0, p1 are the tile in planes 0 and 1, row counts within it.
float code_value(const Grid& grid, const uint8_t* p0, const uint8_t* p1, bool half, int row) {
  const int lane = row % 16;
  const int field = row / 16;
  switch (grid.codes) {
    case Codes::kQ8:
      return static_cast<float>(static_cast<int8_t>(p0[row]) - grid.zero_point);
    case Codes::kF16:
      return half_to_float(static_cast<uint16_t>(lane_bits(p0, 2, row)));
    case Codes::kBF16:
    case Codes::kF32: {
      const bool wide = grid.codes == Codes::kF32;
      const uint32_t bits = wide ? lane_bits(p0, 4, row) : lane_bits(p0, 2, row) << 16;
      float f;
      std::memcpy(&f, &bits, sizeof f);
      return f;
    }
    default:
      break;
  }
  uint32_t code = (lane_bits(p0, half ? 2 : 4, lane) >> (4 * field)) & 0xFu;
  if (grid.codes == Codes::kQ5) code |= ((lane_bits(p1, 1, lane) >> field) & 1u) << 4;
  if (grid.codes == Codes::kQ6) code |= ((lane_bits(p1, half ? 1 : 2, lane) >> (2 * field)) & 3u) << 4;
  return static_cast<float>(static_cast<int32_t>(code) - grid.zero_point);
}

struct ScaleArrays {
  const uint16_t* d;
  const uint16_t* dm;
  const uint8_t* sub;
  const uint8_t* subm;
};

// w = s * value + m with the scales at element offsets (block, super).
float apply_grid(const Grid& grid, const ScaleArrays& a, int64_t block, int64_t super, float value) {
  switch (grid.scale) {
    case Scale::kNone:
      return value;
    case Scale::kF16:
      return half_to_float(a.d[block]) * value;
    case Scale::kF16M:
      return half_to_float(a.d[block]) * value + half_to_float(a.dm[block]);
    case Scale::kU8:
      return half_to_float(a.d[super]) * static_cast<float>(a.sub[block]) * value;
    case Scale::kI8:
      return half_to_float(a.d[super]) * static_cast<float>(static_cast<int8_t>(a.sub[block])) * value;
    case Scale::kU8M:
      return half_to_float(a.d[super]) * static_cast<float>(a.sub[block]) * value -
             half_to_float(a.dm[super]) * static_cast<float>(a.subm[block]);
  }
  return 0.0f;
}

}  // namespace

void dequantise_row(const WeightView& w, int32_t row, float* out) {
  const int32_t tile = row / kTileRows;
  const bool half = w.n_rows - tile * kTileRows < kTileRows;
  const int32_t tile_rows = half ? kHalfTileRows : kTileRows;
  const int32_t in_tile = row % kTileRows;
  const int64_t first_row = static_cast<int64_t>(tile) * kTileRows;
  const uint8_t* base = w.tiled + static_cast<int64_t>(tile) * w.n_cols * column_tile_bytes(w.grid.codes, false);
  const ScaleArrays arrays{w.d, w.dm, w.sub, w.subm};
  for (int32_t j = 0; j < w.n_cols; ++j) {
    const uint8_t* p0 = base + static_cast<int64_t>(j) * column_tile_bytes(w.grid.codes, half);
    const float value = code_value(w.grid, p0, p0 + plane_tile_bytes(w.grid.codes, 0, half), half, in_tile);
    const int32_t block = j / w.grid.group;
    out[j] = apply_grid(
        w.grid, arrays, first_row * w.n_blocks + static_cast<int64_t>(block) * tile_rows + in_tile,
        first_row * w.n_super() + static_cast<int64_t>(block / w.grid.super_blocks) * tile_rows + in_tile, value);
  }
}

void dequantise_embedding_row(const Grid& grid, const uint8_t* bytes, int32_t n, float* out) {
  WeightView column;  // the row lies as a column of n "rows"
  column.grid = grid;
  column.n_rows = (n + kHalfTileRows - 1) / kHalfTileRows * kHalfTileRows;
  const int32_t n_blocks = (n + grid.group - 1) / grid.group;
  const int32_t n_super = (n_blocks + grid.super_blocks - 1) / grid.super_blocks;
  const uint32_t plane1 = column.column_bytes(0);
  const uint8_t* at = bytes + column.column_bytes();
  // Arrays follow in the order sub, subm, d, dm; copied out since their addresses need not be even.
  const int32_t n_d = grid.has_sub() ? n_super : n_blocks;
  std::vector<uint16_t> d(static_cast<size_t>(n_d)), dm(static_cast<size_t>(n_d));
  ScaleArrays arrays{d.data(), dm.data(), nullptr, nullptr};
  if (grid.has_sub()) {
    arrays.sub = at;
    at += n_blocks;
  }
  if (grid.scale == Scale::kU8M) {
    arrays.subm = at;
    at += n_blocks;
  }
  if (grid.scale != Scale::kNone) {
    std::memcpy(d.data(), at, static_cast<size_t>(n_d) * 2);
    at += n_d * 2;
  }
  if (grid.scale == Scale::kF16M || grid.scale == Scale::kU8M) std::memcpy(dm.data(), at, static_cast<size_t>(n_d) * 2);
  for (int32_t i = 0; i < n; ++i) {
    const int32_t tile = i / kTileRows;
    const bool half = column.n_rows - tile * kTileRows < kTileRows;
    const uint8_t* p0 = bytes + static_cast<int64_t>(tile) * plane_tile_bytes(grid.codes, 0, false);
    const uint8_t* p1 = bytes + plane1 + static_cast<int64_t>(tile) * plane_tile_bytes(grid.codes, 1, false);
    const int32_t block = i / grid.group;
    out[i] = apply_grid(grid, arrays, block, block / grid.super_blocks, code_value(grid, p0, p1, half, i % kTileRows));
  }
}

}  // namespace dipper
