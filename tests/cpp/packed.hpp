// Random packed matrices for the tests of kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "half.hpp"
#include "kernels.hpp"

namespace dipper {

struct Packed {
  WeightView view;
  std::vector<uint8_t> records;  // by column
  std::vector<uint8_t> tiled;
  std::vector<uint16_t> d, dm;
  std::vector<uint8_t> sub, subm;
  std::vector<const uint8_t*> columns;
};

inline uint16_t half_of(std::mt19937& random) {  // about 2^-7 .. 2^-5, either sign
  return static_cast<uint16_t>(((random() & 1u) << 15) | ((8u + random() % 3u) << 10) | (random() & 0x3FFu));
}

// Random codes and scales; float codes get small finite numbers.
inline Packed random_matrix(const Grid& grid, int32_t rows, int32_t cols, uint32_t seed) {
  std::mt19937 random(seed);
  Packed p;
  WeightView& w = p.view;
  w.grid = grid;
  w.n_rows = (rows + 63) / 64 * 64;
  w.n_cols = cols;
  w.n_blocks = (cols + grid.group - 1) / grid.group;
  w.plane_offset[1] = w.column_bytes(0);
  const uint32_t bytes = w.column_bytes();
  p.records.resize(static_cast<size_t>(bytes) * static_cast<size_t>(cols));
  for (uint8_t& b : p.records) b = static_cast<uint8_t>(random());
  if (grid.codes == Codes::kF16) {
    for (size_t i = 0; i + 1 < p.records.size(); i += 2) {
      const uint16_t h = half_of(random);
      std::memcpy(&p.records[i], &h, 2);
    }
  } else if (grid.codes == Codes::kBF16 || grid.codes == Codes::kF32) {
    const size_t width = grid.codes == Codes::kF32 ? 4 : 2;
    for (size_t i = 0; i + 1 < p.records.size(); i += width) {
      const float value = half_to_float(half_of(random));
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (width == 2) bits >>= 16;
      std::memcpy(&p.records[i], &bits, width);
    }
  }
  const size_t n = static_cast<size_t>(w.n_blocks) * static_cast<size_t>(w.n_rows);
  for (size_t i = 0; i < n; ++i) {
    p.d.push_back(half_of(random));
    p.dm.push_back(half_of(random));
    p.sub.push_back(static_cast<uint8_t>(random()));
    p.subm.push_back(static_cast<uint8_t>(random()));
  }
  w.d = p.d.data();
  w.dm = p.dm.data();
  w.sub = p.sub.data();
  w.subm = p.subm.data();
  for (int32_t c = 0; c < cols; ++c) p.columns.push_back(p.records.data() + static_cast<size_t>(c) * bytes);
  return p;
}

inline std::vector<float> random_vector(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace dipper
