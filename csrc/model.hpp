// What the native core knows of a model: sizes, where each weight lies, and nothing of architectures' names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "arena.hpp"
#include "kernels.hpp"

namespace dipper {

enum class Activation { kSilu, kGeluTanh };

// Inverse frequencies of one rotary embedding, rotate-half pairing; `long_` serves contexts over original_context.
struct RopeTable {
  int32_t dim = 0;
  const float* short_inv_freq = nullptr;
  const float* long_inv_freq = nullptr;
  int32_t original_context = 0;
  float scale_short = 1.0f;
  float scale_long = 1.0f;
};

struct LayerWeights {
  const float* attn_norm = nullptr;
  const float* mlp_norm = nullptr;
  const float* q_bias = nullptr;  // biases and the norms below may be absent
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
  const float* o_bias = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  const float* post_attn_norm = nullptr;
  const float* post_mlp_norm = nullptr;
  WeightView q, k, v, o;
  int32_t rope = 0;
  int32_t window = 0;  // 0: all positions
};

// All columns of one kind in one layer, as they lie on flash: in units, which are what is read and cached. A unit of a
// region that is not split is one column. In a split region it is several, of which it holds the residuals; the bases
// of all columns follow the units, in the order of the columns.
struct Region {
  int32_t n_columns = 0;
  uint64_t offset = 0;
  uint32_t record_bytes = 0;
  int32_t columns_per_unit = 1;
  uint32_t unit_bytes = 0;
  std::vector<WeightView> matrices;  // gate, up (input) or down (glu)

  // Split regions alone.
  uint32_t base_bytes = 0;               // of a column
  uint64_t base_offset = 0;              // in the file
  const float* residual_norm = nullptr;  // [n_columns]
  bool natural = true;                   // columns lie in units in their own order
  std::vector<int32_t> order;            // [n_columns] the columns as they lie in units
  std::vector<int32_t> unit_of;          // [n_columns] by column
  std::vector<uint32_t> offset_in_unit;  // [n_columns] by column

  bool split() const { return base_bytes != 0; }
  int32_t n_units() const { return (n_columns + columns_per_unit - 1) / columns_per_unit; }
  uint64_t units_bytes() const { return static_cast<uint64_t>(n_units()) * unit_bytes; }
  uint64_t bytes() const {  // of units and bases
    return split() ? bases_at() + bases_bytes() : units_bytes();
  }
  uint64_t bases_bytes() const { return static_cast<uint64_t>(n_columns) * base_bytes; }
  uint64_t bases_at() const { return base_offset - offset; }  // from the first unit
  uint64_t base_record(int32_t column) const { return base_offset + static_cast<uint64_t>(column) * base_bytes; }
  uint64_t unit_offset(int32_t unit) const { return offset + static_cast<uint64_t>(unit) * unit_bytes; }
  // Where the second half of the columns begins, whose products are summed apart.
  int32_t half_column() const { return split_column(n_columns); }
};

// "layer 3, glu columns", by index into Model::regions.
inline std::string region_name(int32_t region) {
  return "layer " + std::to_string(region / 2) + ", " + (region % 2 == 0 ? "input" : "glu") + " columns";
}

// Rows of an untied input embedding on flash.
struct EmbeddingRows {
  int32_t n_rows = 0;
  uint64_t offset = 0;
  uint32_t row_bytes = 0;
  Grid grid{};
};

struct Model {
  int32_t n_layers = 0;
  int32_t hidden = 0;
  int32_t intermediate = 0;
  int32_t n_heads = 0;
  int32_t n_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t vocab = 0;
  float norm_eps = 0.0f;
  float embedding_scale = 1.0f;
  float attention_scale = 1.0f;
  Activation activation = Activation::kSilu;
  bool tied = true;

  std::vector<RopeTable> ropes;
  std::vector<LayerWeights> layers;
  std::vector<Region> regions;  // layer 0 input, layer 0 glu, layer 1 input, ...
  const float* final_norm = nullptr;
  WeightView head;
  EmbeddingRows embedding;

  uint64_t resident_bytes = 0;
  Arena resident;  // the bytes of resident.bin; every pointer above points into it
  std::string flash_path;
  std::string resident_path;
};

// Row `row` of a resident matrix as fp32 [n_cols]: w = s * (code - zero_point) + m.
void dequantise_row(const WeightView& w, int32_t row, float* out);
// One row of an untied embedding: codes of n values, then the row's scales (docs/bundle-format.md section 3).
void dequantise_embedding_row(const Grid& grid, const uint8_t* bytes, int32_t n, float* out);

}  // namespace dipper
