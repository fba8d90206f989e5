// Arithmetic over packed weights and the other per-token loops: one source (kernels.inl), several instruction sets,
// picked once.
//
// Every kernel rounds alike on every ISA: packed codes are summed in exact integers, floats in ascending column order
// with explicit fma, output rows are lanes, reductions over a vector use 16 fixed lanes and one fixed tree. Layouts are
// those of docs/bundle-format.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dipper {

enum class Codes : uint8_t { kQ4, kQ5, kQ6, kQ8, kF16, kBF16, kF32 };
enum class Scale : uint8_t { kNone, kF16, kF16M, kU8, kI8, kU8M };

inline constexpr int32_t kTileRows = 128;
inline constexpr int32_t kHalfTileRows = 64;
// Rows as stored: a multiple of a half tile.
constexpr int32_t padded_rows(int32_t rows) { return (rows + kHalfTileRows - 1) / kHalfTileRows * kHalfTileRows; }

inline constexpr int32_t kMaxGroup = 32;  // columns that share a scale; also the block of float grids

// A region's products are summed in two halves, columns below this one and the others, so that two threads can have
// whole records each; the halves are added last. A multiple of every group.
constexpr int32_t split_column(int32_t n_columns) {
  return ((n_columns + kMaxGroup - 1) / kMaxGroup + 1) / 2 * kMaxGroup;
}

constexpr bool is_float(Codes c) { return c == Codes::kF16 || c == Codes::kBF16 || c == Codes::kF32; }

struct Grid {
  Codes codes;
  Scale scale;
  int32_t group;
  int32_t zero_point;
  int32_t super_blocks;

  // Scales of two levels: 8 bits a block under an f16 a super-block.
  constexpr bool has_sub() const { return scale == Scale::kU8 || scale == Scale::kI8 || scale == Scale::kU8M; }
};

// Bytes of a tile in plane p (0 or 1; 0 bytes where the codes have no second plane).
constexpr int32_t plane_tile_bytes(Codes codes, int p, bool half) {
  switch (codes) {
    case Codes::kQ4:
      return p == 0 ? (half ? 32 : 64) : 0;
    case Codes::kQ5:
      return p == 0 ? (half ? 32 : 64) : 16;
    case Codes::kQ6:
      return p == 0 ? (half ? 32 : 64) : (half ? 16 : 32);
    case Codes::kQ8:
      return p == 0 ? (half ? 64 : 128) : 0;
    case Codes::kF16:
    case Codes::kBF16:
      return p == 0 ? (half ? 128 : 256) : 0;
    case Codes::kF32:
      return p == 0 ? (half ? 256 : 512) : 0;
  }
  return 0;
}
constexpr int32_t column_tile_bytes(Codes codes, bool half) {
  return plane_tile_bytes(codes, 0, half) + plane_tile_bytes(codes, 1, half);
}

// Some bits of every code of a column: `bits` (1, 2 or 4) of them from bit `shift` of the code on, at `offset` of the
// column's record. Within a tile they lie as plane_tile_bytes's planes of as many bits do.
struct Plane {
  int32_t bits = 0;
  int32_t shift = 0;
  uint32_t offset = 0;
};
constexpr int32_t plane_tile_bytes(int32_t bits, bool half) {
  return bits == 1 ? 16 : (half ? kHalfTileRows : kTileRows) * bits / 8;
}

// The planes of one record that belong to one matrix.
struct Planes {
  static constexpr int32_t kMax = 2;
  Plane plane[kMax];
  int32_t n = 0;
};

// What a kernel sees of one matrix. Columns come either as pointers to records (regions) or from `tiled` (resident
// matrices). The codes of a split matrix lie in two records a column, the upper bits in its base, the others in its
// residual.
struct WeightView {
  Grid grid{};
  int32_t n_rows = 0;  // padded to a multiple of 64
  int32_t n_cols = 0;
  int32_t n_blocks = 0;               // of `group` columns
  const uint8_t* tiled = nullptr;     // codes by tile, then column; null for a region's matrix
  uint32_t plane_offset[2] = {0, 0};  // of this matrix's planes within a record (regions only, not split)
  Planes base, residual;              // split: their planes
  int32_t residual_bits = 0;          // split, else 0
  // Scale arrays. Regions: [block][n_rows]. Resident: [tile][block][rows of the tile].
  const uint16_t* d = nullptr;
  const uint16_t* dm = nullptr;  // f16m: the offsets
  const uint8_t* sub = nullptr;
  const uint8_t* subm = nullptr;

  int32_t n_halves() const { return n_rows / kHalfTileRows; }
  int32_t n_tiles() const { return (n_rows + kTileRows - 1) / kTileRows; }
  int32_t n_super() const { return (n_blocks + grid.super_blocks - 1) / grid.super_blocks; }
  uint32_t column_bytes(int p) const {  // of plane p in a record
    return static_cast<uint32_t>(n_rows / kTileRows) * static_cast<uint32_t>(plane_tile_bytes(grid.codes, p, false)) +
           (n_rows % kTileRows ? static_cast<uint32_t>(plane_tile_bytes(grid.codes, p, true)) : 0u);
  }
  uint32_t column_bytes() const { return column_bytes(0) + column_bytes(1); }
};

// The inputs of one block as packed codes take them: x ~ scale * q, q int16; `sum` of q. 16 bits lose 1.5e-5 of a
// block's largest input, 8 would lose 4e-3, and a pair of them costs one instruction either way.
struct BlockInputs {
  float scale;
  int32_t sum;
};

// The used columns of one block of inputs, ascending.
struct BlockColumns {
  int32_t block;
  int32_t n;
  const uint8_t* const* record;  // [n] records (start of the record, not of the plane)
  const float* x;                // [n] their inputs, for float codes
  const int16_t* q;              // the same for packed codes, from Kernels::quantise
  BlockInputs inputs;
  // Records that this matrix is multiplied with next (null: none), brought into the CPU's caches meanwhile.
  const uint8_t* const* next_record = nullptr;
  int32_t n_next = 0;
};

// Columns of one kind of record of a split matrix, ascending, with their inputs.
struct RecordColumns {
  int32_t n = 0;
  const uint8_t* const* record = nullptr;  // [n]
  const int16_t* q = nullptr;              // [n, and a zero more if n is odd]
};

// One block of a split matrix: all of its columns by their base, some of them refined by their residual. The residual
// of the others counts as the middle of what it could be.
struct SplitColumns {
  int32_t block;
  RecordColumns base;
  RecordColumns residual;
  BlockInputs inputs;  // of the base's columns
  int32_t coarse;      // sum of q over the columns that are not refined
  // Records that this matrix is multiplied with next, brought into the CPU's caches meanwhile.
  RecordColumns next;
};

// The same for several tokens. Columns of token t: inputs q[t * q_stride + c]; refined[t * q_stride + c] are the same
// where the column is refined and 0 elsewhere; refined == q: all are.
struct SplitTokens {
  int32_t block;
  int32_t n;
  const uint8_t* const* base;      // [n] records
  const uint8_t* const* residual;  // [n]
  const int16_t* q;
  const int16_t* refined;
  int64_t q_stride;
  const BlockInputs* inputs;  // of token t: inputs[t * inputs_stride], coarse[t * inputs_stride]
  const int32_t* coarse;
  int64_t inputs_stride;
  int32_t n_tokens;
};

// The inputs of a matrix: x [tokens, n_cols] for float codes; q [tokens, q_stride] and blocks [tokens, n_blocks] for
// packed ones.
struct MatrixInputs {
  const float* x;
  const int16_t* q;
  int64_t q_stride;
  const BlockInputs* blocks;
};

// Blocks [begin, end) of a matrix's columns.
struct BlockRange {
  int32_t begin, end;
};

// One block for several tokens: the input of token t, column c is x[t * x_stride + c] or q[t * q_stride + c].
struct BlockTokens {
  int32_t block;
  int32_t n;
  const uint8_t* const* record;
  const float* x;
  int64_t x_stride;
  const int16_t* q;
  int64_t q_stride;
  const BlockInputs* inputs;  // token t: inputs[t * inputs_stride]
  int64_t inputs_stride;
  int32_t n_tokens;
};

// How K and V are kept: as f32, as f16, or as int8 with a scale for each position and head.
enum class KvCodes : uint8_t { kF32, kF16, kI8 };
constexpr int32_t kv_code_bytes(KvCodes c) { return c == KvCodes::kF32 ? 4 : c == KvCodes::kF16 ? 2 : 1; }
constexpr int32_t kv_scale_bytes(KvCodes c) { return c == KvCodes::kI8 ? 4 : 0; }
// Keys and values of one position and head, scales included.
constexpr int32_t kv_position_bytes(KvCodes c, int32_t head_dim) {
  return 2 * (head_dim * kv_code_bytes(c) + kv_scale_bytes(c));
}

// The keys and values of one head. k is [position / 16][head_dim][16], so that 16 positions are 16 lanes; v is
// [position][head_dim]. Scales [position]: kI8 only.
struct KvHead {
  KvCodes codes;
  uint8_t* k;
  uint8_t* v;
  float* k_scale;
  float* v_scale;
};

// Queries that Kernels::attend takes through the keys and values at once.
inline constexpr int32_t kMaxQueries = 4;
// Its scratch: a row of scores a query, of the blocks of 16 that n_positions touch wherever they begin.
constexpr int64_t score_floats(int32_t n_positions) {
  return kMaxQueries * ((static_cast<int64_t>(n_positions) + 30) / 16 * 16);
}

struct Kernels {
  const char* name;
  // q [n, and a zero more if n is odd] of x [n], one block.
  BlockInputs (*quantise)(const float* x, int32_t n, int16_t* q);
  // y[rows of half tiles [begin, end)] += W[:, columns of one block] x
  void (*gemv_block)(const WeightView& w, const BlockColumns& columns, int32_t half_begin, int32_t half_end, float* y);
  // y[...] += W x over some blocks of a matrix that lies by tiles
  void (*gemv_tiled)(const WeightView& w, const MatrixInputs& x, BlockRange blocks, int32_t half_begin,
                     int32_t half_end, float* y);
  // The same for n_tokens at once, y of token t at y + t * y_stride; bit-identical to n_tokens gemv calls.
  void (*gemm_block)(const WeightView& w, const BlockTokens& columns, int32_t tile_begin, int32_t tile_end, float* y,
                     int64_t y_stride);
  void (*gemm_tiled)(const WeightView& w, const MatrixInputs& x, BlockRange blocks, int32_t n_tokens,
                     int32_t tile_begin, int32_t tile_end, float* y, int64_t y_stride);
  // The same for one block of a split matrix.
  void (*gemv_split)(const WeightView& w, const SplitColumns& columns, int32_t half_begin, int32_t half_end, float* y);
  void (*gemm_split)(const WeightView& w, const SplitTokens& columns, int32_t tile_begin, int32_t tile_end, float* y,
                     int64_t y_stride);
  void (*rms_norm)(const float* x, const float* weight, int32_t n, float eps, float* out);
  void (*add)(const float* x, int32_t n, float* y);  // y += x
  // out = act(gate) * up
  void (*silu_mul)(const float* gate, const float* up, int32_t n, float* out);
  void (*gelu_tanh_mul)(const float* gate, const float* up, int32_t n, float* out);
  // Keeps k and v [head_dim] of one position. f16 keeps what is beyond its largest number as that number.
  void (*keep)(const float* k, const float* v, int32_t position, int32_t head_dim, const KvHead& kv);
  // Attention of query heads that share keys and values over positions [first, last): q and out [n_queries, head_dim],
  // scores scratch [score_floats(last - first)]. A query's result does not depend on the others.
  void (*attend)(const float* q, int32_t n_queries, const KvHead& kv, int32_t head_dim, int32_t first, int32_t last,
                 float scale, float* scores, float* out);
  // log(sum(exp(x))) in fp32 lanes, combined in double.
  double (*log_sum_exp)(const float* x, int32_t n);
};

// Room for a row of inputs as integers.
constexpr int64_t padded_inputs(int32_t n) { return (n + 1) / 2 * 2; }
// x [n] by blocks of `group`: q [padded_inputs(n)], blocks [ceil(n / group)].
void quantise_blocks(const Kernels& kernels, const float* x, int32_t n, int32_t group, int16_t* q, BlockInputs* blocks);

// By name: f32, f16, int8. ConfigError for another.
KvCodes kv_codes(const std::string& name);

// "auto": the best this CPU has. Throws ConfigError naming what the CPU has.
const Kernels& select_kernels(const std::string& isa);
std::vector<std::string> available_isas();  // best first; "scalar" is always last

}  // namespace dipper
