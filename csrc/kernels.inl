// The kernels, written once over the lanes of simd.hpp. A translation unit an ISA includes this and exports `table`.
//
// Numbers: packed codes meet inputs that are 16-bit integers with one scale a block, so a block's sum is an exact int32
// and its order is free. Then, once per block, y = fma(s, scale * (sum - zero_point * sum_q), y) and, where the grid
// has offsets, y = fma(m, scale * sum_q, y), blocks ascending. Float codes have no block step: y = fma(w, x, y),
// columns ascending.
#include "kernels.hpp"
#include "simd.hpp"

// Lanes must stay in registers; the scalar reference has none to lose, and inlining it costs minutes of compile time.
#if !defined(DIPPER_ISA_SCALAR)
#define DIPPER_INLINE inline __attribute__((always_inline))
#define DIPPER_EACH [&]<int k>() __attribute__((always_inline))
#else
#define DIPPER_INLINE inline
#define DIPPER_EACH [&]<int k>()
#endif

namespace dipper::DIPPER_ISA {
namespace {

// fn<0>() .. fn<N - 1>(). Loops over arrays of lanes are written so: GCC turns an array into registers only where its
// indices are constants before it looks at loops, and stores it at every use otherwise.
template <int N, int K = 0, typename Fn>
DIPPER_INLINE void unrolled(Fn&& fn) {
  if constexpr (K < N) {
    fn.template operator()<K>();
    unrolled<N, K + 1>(fn);
  }
}

constexpr bool has_nibbles(Codes c) { return c == Codes::kQ4 || c == Codes::kQ5 || c == Codes::kQ6; }

// Fields [K0, K0 + KN) of one tile of a column of float codes.
template <Codes C, int K0, int KN>
DIPPER_INLINE void decode(const uint8_t* p, F (&out)[KN]) {
  static_assert(is_float(C));
  unrolled<KN>(DIPPER_EACH {
    if constexpr (C == Codes::kF16) {
      out[k] = load_f16(p + 32 * (K0 + k));
    } else if constexpr (C == Codes::kBF16) {
      out[k] = load_bf16(p + 32 * (K0 + k));
    } else {
      out[k] = load(reinterpret_cast<const float*>(p) + 16 * (K0 + k));
    }
  });
}

// Nibble codes of odd fields come out of decode_pairs four bits too high, which saves their shift: their sums are 16
// times too large, and exactly so when they are floats.
constexpr int field_shift(Codes c, int field) { return has_nibbles(c) && field % 2 == 1 ? 4 : 0; }

// Fields [K0, K0 + KN) of one tile of two columns of packed codes: a lane a row, one column's code in the lower int16
// and the other's in the upper. a and b point to the tile in planes 0 and 1.
template <Codes C, int K0, int KN, bool Half>
DIPPER_INLINE void decode_pairs(const uint8_t* const (&a)[2], const uint8_t* const (&b)[2], I (&out)[KN]) {
  static_assert(!is_float(C));
  if constexpr (C == Codes::kQ8) {
    unrolled<KN>(
        DIPPER_EACH { out[k] = lower_halves(lanes_i8(a[0] + 16 * (K0 + k)), lanes_i8(b[0] + 16 * (K0 + k))); });
  } else {
    I fours[2];  // fields 0-3 and 4-7: four nibbles of a in the lower half of a lane, of b in the upper
    if constexpr (Half) {
      fours[0] = lower_halves(lanes_u16(a[0]), lanes_u16(b[0]));
    } else {
      const I lanes_a = lanes_u32(a[0]);
      const I lanes_b = lanes_u32(b[0]);
      if constexpr (K0 < 4) fours[0] = lower_halves(lanes_a, lanes_b);
      if constexpr (K0 + KN > 4) fours[1] = upper_halves(lanes_a, lanes_b);
    }
    I high;  // the bits above the nibbles, all fields
    if constexpr (C == Codes::kQ5 || (C == Codes::kQ6 && Half)) high = lower_halves(lanes_u8(a[1]), lanes_u8(b[1]));
    if constexpr (C == Codes::kQ6 && !Half) high = lower_halves(lanes_u16(a[1]), lanes_u16(b[1]));
    unrolled<KN>(DIPPER_EACH {
      constexpr int kField = K0 + k;
      constexpr int kAt = field_shift(C, kField);  // where the code's lowest bit goes
      constexpr uint32_t kNibble = 0x000F000Fu << kAt;
      const I nibbles = kField % 4 < 2 ? fours[kField / 4] : shift_right(fours[kField / 4], 8);
      if constexpr (C == Codes::kQ4) {
        out[k] = bits_and(nibbles, kNibble);
      } else {
        constexpr int kWidth = C == Codes::kQ5 ? 1 : 2;
        constexpr int kUp = kAt + 4 - kWidth * kField;
        const I moved = kUp >= 0 ? shift_left(high, kUp < 0 ? 0 : kUp) : shift_right(high, kUp < 0 ? -kUp : 0);
        out[k] = bits_from(nibbles, kNibble, moved, (kWidth == 1 ? 0x00010001u : 0x00030003u) << (kAt + 4));
      }
    });
  }
}

// Where the scale arrays of (tile, block) start: element offsets into d/dm and sub/subm.
struct ScaleAt {
  int64_t block;
  int64_t super;
};
inline ScaleAt scale_at(const WeightView& w, int32_t tile, int32_t tile_rows, int32_t block) {
  const int32_t super = block / w.grid.super_blocks;
  const int64_t row = static_cast<int64_t>(tile) * kTileRows;
  if (w.tiled == nullptr) {
    return {static_cast<int64_t>(block) * w.n_rows + row, static_cast<int64_t>(super) * w.n_rows + row};
  }
  return {row * w.n_blocks + static_cast<int64_t>(block) * tile_rows,
          row * w.n_super() + static_cast<int64_t>(super) * tile_rows};
}

template <Scale S>
DIPPER_INLINE F scale_of(const WeightView& w, ScaleAt at, int row) {
  if constexpr (S == Scale::kF16 || S == Scale::kF16M) {
    return load_f16(w.d + at.block + row);
  } else if constexpr (S == Scale::kI8) {
    return mul(load_f16(w.d + at.super + row), load_i8(w.sub + at.block + row));
  } else {
    return mul(load_f16(w.d + at.super + row), load_u8(w.sub + at.block + row));
  }
}

// What a block's sums need of its inputs, by field_shift: even fields, odd ones.
template <Codes C>
struct BlockTerms {
  I start[2];  // what a sum starts at: -zero_point * sum_q
  F scale[2];  // of the sum
  F sum_x;     // scale * sum_q
};
template <Codes C>
DIPPER_INLINE BlockTerms<C> terms_of(const WeightView& w, const BlockInputs& x) {
  constexpr int kShift = field_shift(C, 1);
  const int32_t start = -w.grid.zero_point * x.sum;
  return {{set1(start), set1(start * (1 << kShift))},
          {set1(x.scale), set1(x.scale * (1.0f / (1 << kShift)))},
          set1(x.scale * static_cast<float>(x.sum))};
}

// Scale and offset of 16 rows of a block: y += s * scale * sum + m * sum_x.
template <Scale S>
struct RowScales {
  F s, m;
};
template <Scale S>
DIPPER_INLINE RowScales<S> row_scales(const WeightView& w, ScaleAt at, int row) {
  RowScales<S> r;
  r.s = scale_of<S>(w, at, row);
  if constexpr (S == Scale::kF16M) r.m = load_f16(w.dm + at.block + row);
  if constexpr (S == Scale::kU8M)
    r.m = sub(set1(0.0f), mul(load_f16(w.dm + at.super + row), load_u8(w.subm + at.block + row)));
  return r;
}
template <Scale S>
DIPPER_INLINE F apply_scale(const RowScales<S>& r, I sum, F scale, F sum_x, F y) {
  y = fma(r.s, mul(scale, to_float(sum)), y);
  if constexpr (S == Scale::kF16M || S == Scale::kU8M) y = fma(r.m, sum_x, y);
  return y;
}

// One tile of one block. Columns by pointer (record + offset) or by stride from `base`.
template <bool Strided>
struct Columns {
  const uint8_t* const* record;
  const uint8_t* base;
  int64_t stride;
  uint32_t offset[2];  // of the tile within the record (or the column's tile), planes 0 and 1
  inline const uint8_t* at(int i) const { return Strided ? base + i * stride : record[i]; }
};

inline I input_pair(const int16_t* q) {
  uint32_t pair;
  std::memcpy(&pair, q, sizeof pair);
  return set1(static_cast<int32_t>(pair));
}

// sum[fields] += codes * x over n columns: float codes, ascending.
template <Codes C, int K0, int KN, bool Half, bool Strided>
DIPPER_INLINE void accumulate(const Columns<Strided>& columns, int32_t n, const float* x, F (&sum)[KN]) {
  for (int32_t i = 0; i < n; ++i) {
    F code[KN];
    decode<C, K0, KN>(columns.at(i) + columns.offset[0], code);
    const F xi = set1(x[i]);
    unrolled<KN>(DIPPER_EACH { sum[k] = fma(code[k], xi, sum[k]); });
  }
}
// The same of packed codes, two columns at once; the column that an odd n lacks has the input 0.
template <Codes C, int K0, int KN, bool Half, bool Strided>
DIPPER_INLINE void accumulate(const Columns<Strided>& columns, int32_t n, const int16_t* q, I (&sum)[KN]) {
  for (int32_t i = 0; i < n; i += 2) {
    const uint8_t* a = columns.at(i);
    const uint8_t* b = columns.at(i + 1 < n ? i + 1 : i);
    I codes[KN];
    decode_pairs<C, K0, KN, Half>({a + columns.offset[0], a + columns.offset[1]},
                                  {b + columns.offset[0], b + columns.offset[1]}, codes);
    const I xi = input_pair(q + i);
    unrolled<KN>(DIPPER_EACH { sum[k] = dot(codes[k], xi, sum[k]); });
  }
}

inline int32_t tile_rows(const WeightView& w, int32_t t) {
  const int32_t left = w.n_rows - t * kTileRows;
  return left < kTileRows ? kHalfTileRows : kTileRows;
}

template <Codes C>
inline Columns<false> record_columns(const WeightView& w, const uint8_t* const* record, int32_t t) {
  const auto tile = static_cast<uint32_t>(t);
  return {record,
          nullptr,
          0,
          {w.plane_offset[0] + tile * static_cast<uint32_t>(plane_tile_bytes(C, 0, false)),
           w.plane_offset[1] + tile * static_cast<uint32_t>(plane_tile_bytes(C, 1, false))}};
}
template <Codes C>
inline Columns<true> tiled_columns(const WeightView& w, int32_t t, int32_t block, bool half) {
  const int64_t bytes = column_tile_bytes(C, half);
  const uint8_t* base = w.tiled + static_cast<int64_t>(t) * w.n_cols * column_tile_bytes(C, false) +
                        static_cast<int64_t>(block) * w.grid.group * bytes;
  return {nullptr, base, bytes, {0, static_cast<uint32_t>(plane_tile_bytes(C, 0, half))}};
}

// Float codes meet floats and sum to floats; packed ones meet int16 and sum to int32.
template <bool Float>
struct SumOf {
  using type = float;
  using lanes = F;
  using input = float;
};
template <>
struct SumOf<false> {
  using type = int32_t;
  using lanes = I;
  using input = int16_t;
};
template <Codes C>
using Sum = typename SumOf<is_float(C)>::type;
template <Codes C>
using Lanes = typename SumOf<is_float(C)>::lanes;
template <Codes C>
using Input = typename SumOf<is_float(C)>::input;

// Where sums of a tile's columns come from and go to. Packed codes: a block may take several passes, between which its
// integer sums are kept; y takes them up after the last. Float codes have y itself for sums.
struct Pass {
  bool first, last;
};

// Fields [K0, K0 + KN) of a tile: y (and `kept`, the sums between passes) += columns * x. Pointers are the tile's.
template <Codes C, Scale S, int K0, int KN, bool Half, bool Strided>
DIPPER_INLINE void tile_part(const WeightView& w, const Columns<Strided>& columns, int32_t n, const Input<C>* x,
                             const BlockInputs& inputs, ScaleAt at, Pass pass, int32_t* kept, float* y) {
  Lanes<C> sum[KN];
  if constexpr (is_float(C)) {
    unrolled<KN>(DIPPER_EACH { sum[k] = load(y + 16 * (K0 + k)); });
    accumulate<C, K0, KN, Half>(columns, n, x, sum);
    unrolled<KN>(DIPPER_EACH { store(y + 16 * (K0 + k), sum[k]); });
  } else {
    const BlockTerms<C> terms = terms_of<C>(w, inputs);
    if (pass.first) {
      unrolled<KN>(DIPPER_EACH { sum[k] = terms.start[k % 2]; });
    } else {
      unrolled<KN>(DIPPER_EACH { sum[k] = load(kept + 16 * (K0 + k)); });
    }
    accumulate<C, K0, KN, Half>(columns, n, x, sum);
    if (!pass.last) {
      unrolled<KN>(DIPPER_EACH { store(kept + 16 * (K0 + k), sum[k]); });
    } else {
      unrolled<KN>(DIPPER_EACH {
        constexpr int kRow = 16 * (K0 + k);
        store(y + kRow,
              apply_scale<S>(row_scales<S>(w, at, kRow), sum[k], terms.scale[k % 2], terms.sum_x, load(y + kRow)));
      });
    }
  }
}

// Which half tiles of a tile lie in [begin, end): threads share rows by half tiles, since small matrices have few
// tiles.
struct Halves {
  bool lower, upper;
};
inline Halves halves_of(int32_t tile, int32_t begin, int32_t end) {
  return {2 * tile >= begin && 2 * tile < end, 2 * tile + 1 >= begin && 2 * tile + 1 < end};
}

// The half tiles [half_begin, half_end) of one tile.
template <Codes C, Scale S, bool Strided>
DIPPER_INLINE void gemv_tile(const WeightView& w, const Columns<Strided>& columns, int32_t n, const Input<C>* x,
                             const BlockInputs& inputs, int32_t t, int32_t block, int32_t half_begin, int32_t half_end,
                             Pass pass, int32_t* kept, float* y) {
  const Halves halves = halves_of(t, half_begin, half_end);
  const int32_t rows = tile_rows(w, t);
  const ScaleAt at = scale_at(w, t, rows, block);
  if (rows == kHalfTileRows) {
    tile_part<C, S, 0, 4, true>(w, columns, n, x, inputs, at, pass, kept, y);
  } else if (kFieldsAtOnce == 8 && halves.lower && halves.upper) {
    tile_part<C, S, 0, 8, false>(w, columns, n, x, inputs, at, pass, kept, y);
  } else {
    if (halves.lower) tile_part<C, S, 0, 4, false>(w, columns, n, x, inputs, at, pass, kept, y);
    if (halves.upper) tile_part<C, S, 4, 4, false>(w, columns, n, x, inputs, at, pass, kept, y);
  }
}

inline void prefetch_far(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

// A pass goes along the rows of up to 16 records at once: as many sequential streams as the hardware's prefetchers
// follow (measured: 8 to 16 streams over whole records read at nine tenths of one stream's rate, 32 at a third).
constexpr int32_t kMaxStreams = 16;
constexpr int32_t kStripTiles = 128;  // whose sums are kept between passes: 64 KiB

template <Codes C, Scale S>
void gemv_block(const WeightView& w, const BlockColumns& c, int32_t half_begin, int32_t half_end, float* y) {
  alignas(64) int32_t kept[is_float(C) ? 1 : kStripTiles * kTileRows];
  const Input<C>* x;
  if constexpr (is_float(C)) {
    x = c.x;
  } else {
    x = c.q;
  }
  const int32_t n_passes = (c.n + kMaxStreams - 1) / kMaxStreams;
  for (int32_t begin = half_begin, end; begin < half_end; begin = end) {
    end = 2 * (begin / 2 + kStripTiles);  // whole tiles, also where a share begins in the middle of one
    if (end > half_end) end = half_end;
    const int32_t first_tile = begin / 2;
    const int32_t end_tile = (end + 1) / 2;
    for (int32_t p = 0; p < n_passes; ++p) {
      const int32_t first = c.n * p / n_passes / 2 * 2;  // pairs stay together
      const int32_t last = p + 1 < n_passes ? c.n * (p + 1) / n_passes / 2 * 2 : c.n;
      const uint8_t* const* records = c.record + first;
      const bool same_block = p + 1 < n_passes;
      const uint8_t* const* next = same_block ? c.record + last : c.next_record;
      const int32_t n_left = same_block ? c.n - last : c.n_next;
      const int32_t n_next = n_left < kMaxStreams ? n_left : kMaxStreams;
      int32_t* sums = kept;
      for (int32_t t = first_tile; t < end_tile; ++t) {
        const Columns<false> lead = record_columns<C>(w, next, t);
        for (int32_t i = 0; i < n_next; ++i) {
          constexpr int32_t kHighBytes = plane_tile_bytes(C, 1, false);
          for (int32_t line = 0; line < plane_tile_bytes(C, 0, false); line += 64)
            prefetch_far(lead.at(i) + lead.offset[0] + line);
          if constexpr (kHighBytes != 0) {
            if (t == first_tile || t % (64 / kHighBytes) == 0) prefetch_far(lead.at(i) + lead.offset[1]);
          }
        }
        gemv_tile<C, S>(w, record_columns<C>(w, records, t), last - first, x + first, c.inputs, t, c.block, begin, end,
                        {p == 0, p + 1 == n_passes}, sums, y + t * kTileRows);
        if constexpr (!is_float(C)) sums += kTileRows;
      }
    }
  }
}

template <Codes C, Scale S>
void gemv_tiled(const WeightView& w, const MatrixInputs& x, BlockRange blocks, int32_t half_begin, int32_t half_end,
                float* y) {
  for (int32_t t = half_begin / 2; 2 * t < half_end; ++t) {
    const bool half = tile_rows(w, t) == kHalfTileRows;
    for (int32_t b = blocks.begin; b < blocks.end; ++b) {
      const int32_t first = b * w.grid.group;
      const int32_t n = w.n_cols - first < w.grid.group ? w.n_cols - first : w.grid.group;
      const Input<C>* inputs;
      if constexpr (is_float(C)) {
        inputs = x.x + first;
      } else {
        inputs = x.q + first;
      }
      gemv_tile<C, S>(w, tiled_columns<C>(w, t, b, half), n, inputs, is_float(C) ? BlockInputs{} : x.blocks[b], t, b,
                      half_begin, half_end, {true, true}, nullptr, y + t * kTileRows);
    }
  }
}

// Several tokens: the block's codes are decoded once into L1, then multiplied register-blocked (Rows x Tokens sums).
// codes [n, or pairs of columns][kTileRows].
template <Codes C, Scale S, int Rows, int Tokens>
DIPPER_INLINE void multiply(const WeightView& w, const Sum<C>* codes, const BlockTokens& c, int32_t token,
                            const RowScales<S> (&scales)[Rows], int32_t row, float* y, int64_t y_stride) {
  static_assert(Rows % 2 == 0);  // `row` is an even field's
  Lanes<C> sum[Tokens * Rows];
  float* out = y + token * y_stride + row;
  unrolled<Tokens * Rows>(DIPPER_EACH {
    if constexpr (is_float(C)) {
      sum[k] = load(out + k / Rows * y_stride + 16 * (k % Rows));
    } else {
      const int32_t start = -w.grid.zero_point * c.inputs[(token + k / Rows) * c.inputs_stride].sum;
      sum[k] = set1(start * (1 << field_shift(C, k % Rows)));
    }
  });
  constexpr int kAtOnce = is_float(C) ? 1 : 2;  // columns a lane of codes
  for (int32_t i = 0; i < c.n; i += kAtOnce, codes += kTileRows) {
    Lanes<C> code[Rows];
    unrolled<Rows>(DIPPER_EACH { code[k] = load(codes + row + 16 * k); });
    Lanes<C> x;  // of the token at hand: registers are few
    unrolled<Tokens * Rows>(DIPPER_EACH {
      if constexpr (is_float(C)) {
        if constexpr (k % Rows == 0) x = set1(c.x[(token + k / Rows) * c.x_stride + i]);
        sum[k] = fma(code[k % Rows], x, sum[k]);
      } else {
        if constexpr (k % Rows == 0) x = input_pair(c.q + (token + k / Rows) * c.q_stride + i);
        sum[k] = dot(code[k % Rows], x, sum[k]);
      }
    });
  }
  unrolled<Tokens * Rows>(DIPPER_EACH {
    float* to = out + k / Rows * y_stride + 16 * (k % Rows);
    if constexpr (is_float(C)) {
      store(to, sum[k]);
    } else {
      const BlockInputs& in = c.inputs[(token + k / Rows) * c.inputs_stride];
      const F scale = set1(in.scale * (1.0f / (1 << field_shift(C, k % Rows))));
      const F sum_x = set1(in.scale * static_cast<float>(in.sum));
      store(to, apply_scale<S>(scales[k % Rows], sum[k], scale, sum_x, load(to)));
    }
  });
}

// All fields of one column, or of two, of a tile.
template <Codes C, int K0, bool Half, bool Strided>
DIPPER_INLINE void decode_part(const Columns<Strided>& columns, int32_t i, int32_t n, Sum<C>* codes) {
  Lanes<C> lanes[4];
  const uint8_t* a = columns.at(i);
  if constexpr (is_float(C)) {
    decode<C, K0, 4>(a + columns.offset[0], lanes);
  } else {
    const uint8_t* b = columns.at(i + 1 < n ? i + 1 : i);
    decode_pairs<C, K0, 4, Half>({a + columns.offset[0], a + columns.offset[1]},
                                 {b + columns.offset[0], b + columns.offset[1]}, lanes);
  }
  unrolled<4>(DIPPER_EACH { store(codes + 16 * (K0 + k), lanes[k]); });
}

template <Codes C, Scale S, bool Strided>
void gemm_tile(const WeightView& w, const Columns<Strided>& columns, const BlockTokens& c, ScaleAt at, bool half,
               float* y, int64_t y_stride) {
  constexpr int kAtOnce = is_float(C) ? 1 : 2;
  alignas(64) Sum<C> codes[kMaxGroup / kAtOnce * kTileRows];
  for (int32_t i = 0; i < c.n; i += kAtOnce) {
    Sum<C>* to = codes + i / kAtOnce * kTileRows;
    if (half) {
      decode_part<C, 0, true>(columns, i, c.n, to);
    } else {
      decode_part<C, 0, false>(columns, i, c.n, to);
      decode_part<C, 4, false>(columns, i, c.n, to);
    }
  }
  constexpr int kRows = kFieldsAtOnce == 8 ? 4 : 2;
  constexpr int kTokens = kFieldsAtOnce == 8 ? 6 : 3;
  const int32_t rows = half ? kHalfTileRows : kTileRows;
  for (int32_t row = 0; row < rows; row += 16 * kRows) {
    RowScales<S> scales[kRows];
    if constexpr (!is_float(C)) unrolled<kRows>(DIPPER_EACH { scales[k] = row_scales<S>(w, at, row + 16 * k); });
    int32_t t = 0;
    for (; t + kTokens <= c.n_tokens; t += kTokens)
      multiply<C, S, kRows, kTokens>(w, codes, c, t, scales, row, y, y_stride);
    for (; t < c.n_tokens; ++t) multiply<C, S, kRows, 1>(w, codes, c, t, scales, row, y, y_stride);
  }
}

template <Codes C, Scale S>
void gemm_block(const WeightView& w, const BlockTokens& c, int32_t tile_begin, int32_t tile_end, float* y,
                int64_t y_stride) {
  for (int32_t t = tile_begin; t < tile_end; ++t) {
    const int32_t rows = tile_rows(w, t);
    gemm_tile<C, S, false>(w, record_columns<C>(w, c.record, t), c, scale_at(w, t, rows, c.block),
                           rows == kHalfTileRows, y + t * kTileRows, y_stride);
  }
}

template <Codes C, Scale S>
void gemm_tiled(const WeightView& w, const MatrixInputs& x, BlockRange blocks, int32_t n_tokens, int32_t tile_begin,
                int32_t tile_end, float* y, int64_t y_stride) {
  for (int32_t t = tile_begin; t < tile_end; ++t) {
    const int32_t rows = tile_rows(w, t);
    const bool half = rows == kHalfTileRows;
    for (int32_t b = blocks.begin; b < blocks.end; ++b) {
      const int32_t first = b * w.grid.group;
      const int32_t n = w.n_cols - first < w.grid.group ? w.n_cols - first : w.grid.group;
      const BlockTokens c{b,           n,          nullptr,      x.x + first, w.n_cols,
                          x.q + first, x.q_stride, x.blocks + b, w.n_blocks,  n_tokens};
      gemm_tile<C, S, true>(w, tiled_columns<C>(w, t, b, half), c, scale_at(w, t, rows, b), half, y + t * kTileRows,
                            y_stride);
    }
  }
}

// --- split matrices: planes of 1, 2 and 4 bits, each with its own columns --------------------------------------------

// Fields of a plane are taken out of their lanes up to four bits too high, which saves most shifts; sums are kept 16
// times too large all the way to the scale, which makes up for it, exactly.
constexpr int kSumShift = 4;
constexpr int fields_a_shift(int bits) { return bits == 1 ? 5 : bits == 2 ? 3 : 2; }
constexpr int fields_a_word(int bits) { return bits == 4 ? 4 : 8; }
constexpr int left_in_place(int bits, int field) {  // bits by which a field is too high
  return field % fields_a_word(bits) % fields_a_shift(bits) * bits;
}

// Fields [K0, K0 + KN) of one tile of a plane of two columns, one column's in the lower int16 of a lane.
template <int Bits, int K0, int KN, bool Half>
DIPPER_INLINE void plane_pairs(const uint8_t* a, const uint8_t* b, I (&out)[KN]) {
  I words[2];
  if constexpr (Bits == 4 && !Half) {
    const I lanes_a = lanes_u32(a);
    const I lanes_b = lanes_u32(b);
    if constexpr (K0 < 4) words[0] = lower_halves(lanes_a, lanes_b);
    if constexpr (K0 + KN > 4) words[1] = upper_halves(lanes_a, lanes_b);
  } else if constexpr (Bits == 1 || (Bits == 2 && Half)) {
    words[0] = lower_halves(lanes_u8(a), lanes_u8(b));
  } else {
    words[0] = lower_halves(lanes_u16(a), lanes_u16(b));
  }
  unrolled<KN>(DIPPER_EACH {
    constexpr int kField = (K0 + k) % fields_a_word(Bits);
    constexpr int kDown = kField / fields_a_shift(Bits) * fields_a_shift(Bits) * Bits;
    constexpr uint32_t kMask = ((1u << Bits) - 1u) << left_in_place(Bits, kField);
    const I word = words[(K0 + k) / fields_a_word(Bits)];
    out[k] = bits_and(kDown == 0 ? word : shift_right(word, kDown), kMask | (kMask << 16));
  });
}

// kept[fields] += 16 * 2^shift * plane * q over n columns of one tile; offset is the tile's within the record.
template <int Bits, int K0, int KN, bool Half>
DIPPER_INLINE void add_plane(const uint8_t* const* record, int32_t n, const int16_t* q, uint32_t offset, int32_t shift,
                             int32_t* kept) {
  I sum[KN];
  unrolled<KN>(DIPPER_EACH { sum[k] = set1(0); });
  for (int32_t i = 0; i < n; i += 2) {
    I codes[KN];
    plane_pairs<Bits, K0, KN, Half>(record[i] + offset, record[i + 1 < n ? i + 1 : i] + offset, codes);
    const I xi = input_pair(q + i);
    unrolled<KN>(DIPPER_EACH { sum[k] = dot(codes[k], xi, sum[k]); });
  }
  unrolled<KN>(DIPPER_EACH {
    int32_t* to = kept + 16 * (K0 + k);
    store(to, add(load(to), shift_left(sum[k], shift + kSumShift - left_in_place(Bits, K0 + k))));
  });
}

template <int Bits>
DIPPER_INLINE void add_plane_tile(const WeightView& w, const Plane& plane, const uint8_t* const* record, int32_t n,
                                  const int16_t* q, int32_t t, Halves halves, int32_t* kept) {
  const uint32_t offset = plane.offset + static_cast<uint32_t>(t * plane_tile_bytes(Bits, false));
  if (tile_rows(w, t) == kHalfTileRows) {
    add_plane<Bits, 0, 4, true>(record, n, q, offset, plane.shift, kept);
  } else if (kFieldsAtOnce == 8 && halves.lower && halves.upper) {
    add_plane<Bits, 0, 8, false>(record, n, q, offset, plane.shift, kept);
  } else {
    if (halves.lower) add_plane<Bits, 0, 4, false>(record, n, q, offset, plane.shift, kept);
    if (halves.upper) add_plane<Bits, 4, 4, false>(record, n, q, offset, plane.shift, kept);
  }
}

// What a block's sum starts at: the zero point of all columns, and the middle of the residuals that are not known.
inline int32_t split_start(const WeightView& w, const BlockInputs& inputs, int32_t coarse) {
  const int32_t all = (1 << w.residual_bits) - 1;
  return -w.grid.zero_point * inputs.sum + ((all * coarse) >> 1);
}

// The records of a pass, and those of the next, which it asks for.
struct SplitPass {
  const Planes* planes;
  RecordColumns columns;
};

// Asks for one tile of a pass's records; a line of them at a time.
DIPPER_INLINE void prefetch_tile(const SplitPass& pass, int32_t t, bool first) {
  for (int32_t p = 0; p < pass.planes->n; ++p) {
    const Plane& plane = pass.planes->plane[p];
    const int32_t bytes = plane_tile_bytes(plane.bits, false);
    if (!first && t % (64 / bytes) != 0) continue;
    for (int32_t i = 0; i < pass.columns.n; ++i) prefetch_far(pass.columns.record[i] + plane.offset + t * bytes);
  }
}

template <Scale S>
void gemv_split(const WeightView& w, const SplitColumns& c, int32_t half_begin, int32_t half_end, float* y) {
  alignas(64) int32_t kept[kStripTiles * kTileRows];
  SplitPass passes[2 * kMaxGroup / kMaxStreams + 1];
  int32_t n_passes = 0;
  const auto take = [&](const Planes& planes, const RecordColumns& all) {
    const int32_t n = (all.n + kMaxStreams - 1) / kMaxStreams;
    for (int32_t p = 0; p < n; ++p) {
      const int32_t first = all.n * p / n / 2 * 2;  // pairs stay together
      const int32_t last = p + 1 < n ? all.n * (p + 1) / n / 2 * 2 : all.n;
      passes[n_passes++] = {&planes, {last - first, all.record + first, all.q + first}};
    }
  };
  take(w.base, c.base);
  take(w.residual, c.residual);
  passes[n_passes] = {&w.base, {c.next.n < kMaxStreams ? c.next.n : kMaxStreams, c.next.record, nullptr}};
  const I start = set1(split_start(w, c.inputs, c.coarse) * (1 << kSumShift));
  const F scale = set1(c.inputs.scale * (1.0f / (1 << kSumShift)));
  const F sum_x = set1(c.inputs.scale * static_cast<float>(c.inputs.sum));
  for (int32_t begin = half_begin, end; begin < half_end; begin = end) {
    end = 2 * (begin / 2 + kStripTiles);
    if (end > half_end) end = half_end;
    const int32_t first_tile = begin / 2;
    const int32_t n_tiles = (end + 1) / 2 - first_tile;
    for (int32_t i = 0; i < n_tiles * kTileRows; i += 16) store(kept + i, start);
    for (int32_t p = 0; p < n_passes; ++p) {
      const SplitPass& pass = passes[p];
      for (int32_t i = 0; i < n_tiles; ++i) {
        const int32_t t = first_tile + i;
        prefetch_tile(passes[p + 1], t, i == 0);
        const Halves halves = halves_of(t, begin, end);
        for (int32_t k = 0; k < pass.planes->n; ++k) {
          const Plane& plane = pass.planes->plane[k];
          const auto add = plane.bits == 1   ? add_plane_tile<1>
                           : plane.bits == 2 ? add_plane_tile<2>
                                             : add_plane_tile<4>;
          add(w, plane, pass.columns.record, pass.columns.n, pass.columns.q, t, halves, kept + i * kTileRows);
        }
      }
    }
    for (int32_t i = 0; i < n_tiles; ++i) {
      const int32_t t = first_tile + i;
      const int32_t rows = tile_rows(w, t);
      const ScaleAt at = scale_at(w, t, rows, c.block);
      const Halves halves = halves_of(t, begin, end);
      for (int32_t row = halves.lower ? 0 : kHalfTileRows; row < (halves.upper ? rows : kHalfTileRows); row += 16) {
        float* to = y + t * kTileRows + row;
        store(to, apply_scale<S>(row_scales<S>(w, at, row), load(kept + i * kTileRows + row), scale, sum_x, load(to)));
      }
    }
  }
}

// codes [pairs of columns][kTileRows] of one tile gain a plane's bits.
template <int Bits, bool Half>
DIPPER_INLINE void decode_plane(const uint8_t* const* record, int32_t n, uint32_t offset, int32_t shift,
                                int32_t* codes) {
  constexpr int kFields = Half ? 4 : 8;
  for (int32_t i = 0; i < n; i += 2, codes += kTileRows) {
    I lanes[kFields];
    plane_pairs<Bits, 0, kFields, Half>(record[i] + offset, record[i + 1 < n ? i + 1 : i] + offset, lanes);
    unrolled<kFields>(DIPPER_EACH {
      const I code = shift_left(shift_right(lanes[k], left_in_place(Bits, k)), shift);
      store(codes + 16 * k, add(load(codes + 16 * k), code));
    });
  }
}
inline void decode_planes(const Planes& planes, const uint8_t* const* record, int32_t n, int32_t t, bool half,
                          int32_t* codes) {
  for (int32_t p = 0; p < planes.n; ++p) {
    const Plane& plane = planes.plane[p];
    const uint32_t offset = plane.offset + static_cast<uint32_t>(t * plane_tile_bytes(plane.bits, false));
    const auto decode = plane.bits == 1   ? (half ? decode_plane<1, true> : decode_plane<1, false>)
                        : plane.bits == 2 ? (half ? decode_plane<2, true> : decode_plane<2, false>)
                                          : (half ? decode_plane<4, true> : decode_plane<4, false>);
    decode(record, n, offset, plane.shift, codes);
  }
}

// Rows [row, row + 16 Rows) of a tile for some tokens: y += scale * (codes * q + residual codes * refined).
template <Scale S, int Rows, int Tokens>
DIPPER_INLINE void multiply_split(const WeightView& w, const int32_t* codes, const int32_t* residual,
                                  const SplitTokens& c, int32_t token, const RowScales<S> (&scales)[Rows], int32_t row,
                                  float* y, int64_t y_stride) {
  I sum[Tokens * Rows];
  unrolled<Tokens * Rows>(DIPPER_EACH {
    const int64_t t = (token + k / Rows) * c.inputs_stride;
    sum[k] = set1(split_start(w, c.inputs[t], c.coarse != nullptr ? c.coarse[t] : 0));
  });
  const auto add_products = [&](const int32_t* from, const int16_t* q) __attribute__((always_inline)) {
    for (int32_t i = 0; i < c.n; i += 2, from += kTileRows) {
      I code[Rows];
      unrolled<Rows>(DIPPER_EACH { code[k] = load(from + row + 16 * k); });
      I x;
      unrolled<Tokens * Rows>(DIPPER_EACH {
        if constexpr (k % Rows == 0) x = input_pair(q + (token + k / Rows) * c.q_stride + i);
        sum[k] = dot(code[k % Rows], x, sum[k]);
      });
    }
  };
  add_products(codes, c.q);
  if (residual != nullptr) add_products(residual, c.refined);
  float* out = y + token * y_stride + row;
  unrolled<Tokens * Rows>(DIPPER_EACH {
    float* to = out + k / Rows * y_stride + 16 * (k % Rows);
    const BlockInputs& in = c.inputs[(token + k / Rows) * c.inputs_stride];
    store(to, apply_scale<S>(scales[k % Rows], sum[k], set1(in.scale), set1(in.scale * static_cast<float>(in.sum)),
                             load(to)));
  });
}

template <Scale S>
void gemm_split(const WeightView& w, const SplitTokens& c, int32_t tile_begin, int32_t tile_end, float* y,
                int64_t y_stride) {
  constexpr int32_t kCodes = kMaxGroup / 2 * kTileRows;
  alignas(64) int32_t codes[2 * kCodes];
  const bool all_refined = c.refined == c.q;
  int32_t* residual = all_refined ? codes : codes + kCodes;
  for (int32_t t = tile_begin; t < tile_end; ++t) {
    const int32_t rows = tile_rows(w, t);
    const bool half = rows == kHalfTileRows;
    std::memset(codes, 0, sizeof codes);
    decode_planes(w.base, c.base, c.n, t, half, codes);
    decode_planes(w.residual, c.residual, c.n, t, half, residual);
    const ScaleAt at = scale_at(w, t, rows, c.block);
    constexpr int kRows = kFieldsAtOnce == 8 ? 4 : 2;
    constexpr int kTokens = kFieldsAtOnce == 8 ? 6 : 3;
    for (int32_t row = 0; row < rows; row += 16 * kRows) {
      RowScales<S> scales[kRows];
      unrolled<kRows>(DIPPER_EACH { scales[k] = row_scales<S>(w, at, row + 16 * k); });
      const int32_t* lower = all_refined ? nullptr : residual;
      float* out = y + t * kTileRows;
      int32_t i = 0;
      for (; i + kTokens <= c.n_tokens; i += kTokens)
        multiply_split<S, kRows, kTokens>(w, codes, lower, c, i, scales, row, out, y_stride);
      for (; i < c.n_tokens; ++i) multiply_split<S, kRows, 1>(w, codes, lower, c, i, scales, row, out, y_stride);
    }
  }
}

// The largest |x|; 0 below 1e-30, which no sum would notice, NaN where some x is not finite.
inline float largest_magnitude(const float* x, int32_t n) {
  I top = set1(0);
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) top = max_signed(magnitude_bits(load(x + i)), top);
  if (i < n) top = max_signed(magnitude_bits(load_partial(x + i, n - i, 0.0f)), top);
  const int32_t bits = reduce_max(top);  // of finite numbers, infinity and NaN in this order
  if (bits < 0x0DA24260) return 0.0f;
  if (bits >= 0x7F800000) return __builtin_nanf("");
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest;
}

// x ~ scale * q, q = round(x / scale) with the largest |x| at 32767; q has a zero more where n is odd. Inputs that are
// not finite make the scale NaN, and with it what is computed from them.
BlockInputs quantise(const float* x, int32_t n, int16_t* q) {
  const float largest = largest_magnitude(x, n);
  int32_t i = 0;
  if (n % 2 == 1) q[n] = 0;
  if (!(largest > 0.0f)) {
    for (; i < n; ++i) q[i] = 0;
    return {largest, 0};
  }
  const F inverse = set1(32767.0f / largest);
  I sum = set1(0);
  for (; i + 16 <= n; i += 16) {
    const I rounded = to_int(mul(load(x + i), inverse));
    store_i16(q + i, rounded);
    sum = add(rounded, sum);
  }
  if (i < n) {
    const I rounded = to_int(mul(load_partial(x + i, n - i, 0.0f), inverse));
    int16_t last[16];
    store_i16(last, rounded);
    std::memcpy(q + i, last, static_cast<size_t>(n - i) * sizeof(int16_t));
    sum = add(rounded, sum);
  }
  return {largest / 32767.0f, reduce_add(sum)};
}

// Runs fn.template operator()<scale>() for the scales of packed codes.
template <typename Fn>
inline void with_scale(Scale scale, Fn&& fn) {
  switch (scale) {
    case Scale::kF16:
      return fn.template operator()<Scale::kF16>();
    case Scale::kF16M:
      return fn.template operator()<Scale::kF16M>();
    case Scale::kU8:
      return fn.template operator()<Scale::kU8>();
    case Scale::kI8:
      return fn.template operator()<Scale::kI8>();
    default:
      return fn.template operator()<Scale::kU8M>();
  }
}

// Runs fn.template operator()<codes, scale>() for the grids that bundles hold.
template <typename Fn>
inline void with_grid(const Grid& grid, Fn&& fn) {
  const auto packed = [&]<Codes C>() { with_scale(grid.scale, [&]<Scale S>() { fn.template operator()<C, S>(); }); };
  switch (grid.codes) {
    case Codes::kQ4:
      return packed.template operator()<Codes::kQ4>();
    case Codes::kQ5:
      return packed.template operator()<Codes::kQ5>();
    case Codes::kQ6:
      return packed.template operator()<Codes::kQ6>();
    case Codes::kQ8:
      return packed.template operator()<Codes::kQ8>();
    case Codes::kF16:
      return fn.template operator()<Codes::kF16, Scale::kNone>();
    case Codes::kBF16:
      return fn.template operator()<Codes::kBF16, Scale::kNone>();
    default:
      return fn.template operator()<Codes::kF32, Scale::kNone>();
  }
}

void gemv_block_any(const WeightView& w, const BlockColumns& c, int32_t half_begin, int32_t half_end, float* y) {
  with_grid(w.grid, [&]<Codes C, Scale S>() { gemv_block<C, S>(w, c, half_begin, half_end, y); });
}
void gemv_tiled_any(const WeightView& w, const MatrixInputs& x, BlockRange blocks, int32_t half_begin, int32_t half_end,
                    float* y) {
  with_grid(w.grid, [&]<Codes C, Scale S>() { gemv_tiled<C, S>(w, x, blocks, half_begin, half_end, y); });
}
void gemm_block_any(const WeightView& w, const BlockTokens& c, int32_t tile_begin, int32_t tile_end, float* y,
                    int64_t y_stride) {
  with_grid(w.grid, [&]<Codes C, Scale S>() { gemm_block<C, S>(w, c, tile_begin, tile_end, y, y_stride); });
}
void gemm_tiled_any(const WeightView& w, const MatrixInputs& x, BlockRange blocks, int32_t n_tokens, int32_t tile_begin,
                    int32_t tile_end, float* y, int64_t y_stride) {
  with_grid(w.grid,
            [&]<Codes C, Scale S>() { gemm_tiled<C, S>(w, x, blocks, n_tokens, tile_begin, tile_end, y, y_stride); });
}
void gemv_split_any(const WeightView& w, const SplitColumns& c, int32_t half_begin, int32_t half_end, float* y) {
  with_scale(w.grid.scale, [&]<Scale S>() { gemv_split<S>(w, c, half_begin, half_end, y); });
}
void gemm_split_any(const WeightView& w, const SplitTokens& c, int32_t tile_begin, int32_t tile_end, float* y,
                    int64_t y_stride) {
  with_scale(w.grid.scale, [&]<Scale S>() { gemm_split<S>(w, c, tile_begin, tile_end, y, y_stride); });
}

// exp for x <= 88; results below 2^-126 are flushed to 2^-126 * p, far under what a softmax can see. Relative error < 2
// ulp: Cody-Waite reduction and a degree-6 polynomial (minimax coefficients after Cephes' expf).
inline F exp(F x) {
  x = min(max(x, set1(-87.0f)), set1(88.0f));
  const F magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer on every ISA
  const F n = sub(add(mul(x, set1(1.44269504f)), magic), magic);
  F r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return mul(p, exp2_int(n));
}

void rms_norm(const float* x, const float* weight, int32_t n, float eps, float* out) {
  F squares = set1(0.0f);
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) squares = fma(load(x + i), load(x + i), squares);
  if (i < n) squares = fma(load_partial(x + i, n - i, 0.0f), load_partial(x + i, n - i, 0.0f), squares);
  const F inverse = set1(1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(n) + eps));
  for (i = 0; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), inverse), load(weight + i)));
  if (i < n)
    store_partial(out + i, n - i,
                  mul(mul(load_partial(x + i, n - i, 0.0f), inverse), load_partial(weight + i, n - i, 0.0f)));
}

inline F silu(F g) { return div(g, add(set1(1.0f), exp(sub(set1(0.0f), g)))); }

// 0.5 g (1 + tanh(u)) = g * (1 - 1 / (exp(2u) + 1)), u = sqrt(2/pi) (g + 0.044715 g^3)
inline F gelu_tanh(F g) {
  const F cubic = mul(mul(g, g), g);
  const F u2 = mul(set1(1.5957691216f), fma(set1(0.044715f), cubic, g));
  return mul(g, sub(set1(1.0f), div(set1(1.0f), add(exp(u2), set1(1.0f)))));
}

void add_to(const float* x, int32_t n, float* y) {
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, add(load(y + i), load(x + i)));
  for (; i < n; ++i) y[i] += x[i];
}

template <typename Act>
inline void act_mul(const float* gate, const float* up, int32_t n, float* out, Act act) {
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, mul(act(load(gate + i)), load(up + i)));
  if (i < n)
    store_partial(out + i, n - i, mul(act(load_partial(gate + i, n - i, 0.0f)), load_partial(up + i, n - i, 0.0f)));
}
void silu_mul(const float* gate, const float* up, int32_t n, float* out) {
  act_mul(gate, up, n, out, [](F g) { return silu(g); });
}
void gelu_tanh_mul(const float* gate, const float* up, int32_t n, float* out) {
  act_mul(gate, up, n, out, [](F g) { return gelu_tanh(g); });
}

// scores -> exp(scores - max); returns their sum.
inline float exponentiate(float* scores, int32_t n) {
  F top = set1(-3.0e38f);
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) top = max(load(scores + i), top);
  if (i < n) top = max(load_partial(scores + i, n - i, -3.0e38f), top);
  const F shift = set1(reduce_max(top));
  F sum = set1(0.0f);
  for (i = 0; i + 16 <= n; i += 16) {
    const F e = exp(sub(load(scores + i), shift));
    store(scores + i, e);
    sum = add(sum, e);
  }
  if (i < n) {  // the filler's exp is the flush value, 2^-125: nothing beside the 1 of the largest score
    const F e = exp(sub(load_partial(scores + i, n - i, -3.0e38f), shift));
    store_partial(scores + i, n - i, e);
    sum = add(sum, e);
  }
  return reduce_add(sum);
}

constexpr int64_t kv_bytes(KvCodes c) { return kv_code_bytes(c); }
template <KvCodes K>
DIPPER_INLINE F load_kv(const uint8_t* p) {
  if constexpr (K == KvCodes::kF32) {
    return load(reinterpret_cast<const float*>(p));
  } else if constexpr (K == KvCodes::kF16) {
    return load_f16(p);
  } else {
    return load_i8(p);
  }
}

// x [n] to codes; returns their scale.
template <KvCodes K>
inline float kv_codes(const float* x, int32_t n, uint8_t* codes) {
  int32_t i = 0;
  if constexpr (K == KvCodes::kF32) {
    std::memcpy(codes, x, static_cast<size_t>(n) * sizeof(float));
    return 1.0f;
  } else if constexpr (K == KvCodes::kF16) {
    const auto clamp = [](F v) { return min(set1(65504.0f), max(set1(-65504.0f), v)); };  // a NaN stays one
    for (; i + 16 <= n; i += 16) store_f16(codes + 2 * i, clamp(load(x + i)));
    if (i < n) {
      uint8_t last[32];
      store_f16(last, clamp(load_partial(x + i, n - i, 0.0f)));
      std::memcpy(codes + 2 * i, last, static_cast<size_t>(2 * (n - i)));
    }
    return 1.0f;
  } else {
    const float largest = largest_magnitude(x, n);
    if (!(largest > 0.0f)) {
      std::memset(codes, 0, static_cast<size_t>(n));
      return largest;
    }
    const F inverse = set1(127.0f / largest);
    for (; i < n; i += 16) {
      const int32_t left = n - i < 16 ? n - i : 16;
      int32_t q[16];
      store(q, to_int(mul(left == 16 ? load(x + i) : load_partial(x + i, left, 0.0f), inverse)));
      for (int32_t lane = 0; lane < left; ++lane) codes[i + lane] = static_cast<uint8_t>(q[lane]);
    }
    return largest / 127.0f;
  }
}

template <KvCodes K>
inline void keep_as(const float* k, const float* v, int32_t position, int32_t head_dim, const KvHead& kv) {
  constexpr int64_t kBytes = kv_bytes(K);
  constexpr int32_t kAtOnce = 64;
  uint8_t* column = kv.k + (static_cast<int64_t>(position / 16) * 16 * head_dim + position % 16) * kBytes;
  if constexpr (K != KvCodes::kI8) {
    for (int32_t i = 0; i < head_dim; i += kAtOnce) {
      const int32_t n = head_dim - i < kAtOnce ? head_dim - i : kAtOnce;
      uint8_t codes[kAtOnce * kBytes];
      kv_codes<K>(k + i, n, codes);
      for (int32_t j = 0; j < n; ++j) std::memcpy(column + 16 * (i + j) * kBytes, codes + j * kBytes, kBytes);
    }
    kv_codes<K>(v, head_dim, kv.v + static_cast<int64_t>(position) * head_dim * kBytes);
  } else {
    uint8_t* row = kv.v + static_cast<int64_t>(position) * head_dim;
    kv.k_scale[position] = kv_codes<K>(k, head_dim, row);  // by way of v's place
    for (int32_t i = 0; i < head_dim; ++i) column[16 * i] = row[i];
    kv.v_scale[position] = kv_codes<K>(v, head_dim, row);
  }
}
void keep(const float* k, const float* v, int32_t position, int32_t head_dim, const KvHead& kv) {
  switch (kv.codes) {
    case KvCodes::kF32:
      return keep_as<KvCodes::kF32>(k, v, position, head_dim, kv);
    case KvCodes::kF16:
      return keep_as<KvCodes::kF16>(k, v, position, head_dim, kv);
    default:
      return keep_as<KvCodes::kI8>(k, v, position, head_dim, kv);
  }
}

// Attention of several queries reads keys and values once for all of them. So many blocks of positions, or chunks of
// values, are summed at once: some hide the latency of fma, more would not fit in registers.
constexpr int at_once(int n_queries) {
  constexpr int kSums = kFieldsAtOnce == 8 ? 16 : 4;
  return kSums / n_queries < 4 ? kSums / n_queries : 4;
}

// Keys and values this far ahead come into L2 meanwhile. Measured: without, attention takes about as long as its sums
// in cache and its reads at DRAM's rate together.
constexpr int32_t kPositionsAhead = 64;
template <int64_t Bytes>
DIPPER_INLINE void prefetch_lines(const uint8_t* p) {
  unrolled<(Bytes + 63) / 64>(DIPPER_EACH { prefetch_far(p + 64 * k); });
}

// scores[query][16 * Blocks] = scale * q . k of as many positions from block b on; end_block: of all positions.
template <KvCodes K, int Queries, int Blocks>
DIPPER_INLINE void score_blocks(const float* q, const KvHead& kv, int32_t head_dim, int32_t b, int32_t end_block,
                                F scale, float* scores, int64_t scores_stride) {
  constexpr int64_t kLaneBytes = 16 * kv_bytes(K);
  const int64_t stride = head_dim * kLaneBytes;
  const int32_t next = b + kPositionsAhead / 16;
  const uint8_t* block = kv.k + b * stride;
  const uint8_t* ahead = kv.k + (next + Blocks < end_block ? next : end_block - Blocks) * stride;
  F acc[Blocks * Queries];
  unrolled<Blocks * Queries>(DIPPER_EACH { acc[k] = set1(0.0f); });
  for (int32_t i = 0; i < head_dim; ++i) {
    prefetch_lines<Blocks * kLaneBytes>(ahead + i * Blocks * kLaneBytes);
    F x[Queries];
    unrolled<Queries>(DIPPER_EACH { x[k] = set1(q[k * head_dim + i]); });
    F keys;  // of the block at hand
    unrolled<Blocks * Queries>(DIPPER_EACH {
      if constexpr (k % Queries == 0) keys = load_kv<K>(block + k / Queries * stride + i * kLaneBytes);
      acc[k] = fma(x[k % Queries], keys, acc[k]);
    });
  }
  unrolled<Blocks * Queries>(DIPPER_EACH {
    constexpr int kBlock = k / Queries;
    if constexpr (K == KvCodes::kI8) acc[k] = mul(acc[k], load(kv.k_scale + 16 * (b + kBlock)));
    store(scores + k % Queries * scores_stride + 16 * kBlock, mul(acc[k], scale));
  });
}

// out[query][16 * Chunks] += sum over positions [begin, end) of p * v, ascending; end_position: of all.
template <KvCodes K, int Queries, int Chunks>
DIPPER_INLINE void weighted_sum(const float* p, int64_t p_stride, const uint8_t* v, int32_t head_dim, int32_t begin,
                                int32_t end, int32_t end_position, float* out) {
  constexpr int64_t kLaneBytes = 16 * kv_bytes(K);
  const int64_t stride = head_dim * kv_bytes(K);
  F acc[Chunks * Queries];
  unrolled<Chunks * Queries>(DIPPER_EACH { acc[k] = load(out + k % Queries * head_dim + 16 * (k / Queries)); });
  for (int32_t i = begin; i < end; ++i) {
    const int32_t next = i + kPositionsAhead;
    prefetch_lines<Chunks * kLaneBytes>(v + (next < end_position ? next : end_position - 1) * stride);
    F weights[Queries];
    unrolled<Queries>(DIPPER_EACH { weights[k] = set1(p[k * p_stride + i]); });
    F values;  // of the chunk at hand
    unrolled<Chunks * Queries>(DIPPER_EACH {
      if constexpr (k % Queries == 0) values = load_kv<K>(v + i * stride + k / Queries * kLaneBytes);
      acc[k] = fma(weights[k % Queries], values, acc[k]);
    });
  }
  unrolled<Chunks * Queries>(DIPPER_EACH { store(out + k % Queries * head_dim + 16 * (k / Queries), acc[k]); });
}

template <KvCodes K, int Queries>
inline void attend_together(const float* q, const KvHead& kv, int32_t head_dim, int32_t first, int32_t last,
                            float scale, float* scores, float* out) {
  constexpr int64_t kBytes = kv_bytes(K);
  constexpr int kAtOnce = at_once(Queries);
  const int32_t first_block = first / 16;
  const int32_t end_block = (last + 15) / 16;
  const int64_t stride = 16 * (end_block - first_block);  // of scores
  const F scale_lanes = set1(scale);
  int32_t b = first_block;  // lanes outside [first, last) are computed and not used
  for (; b + kAtOnce <= end_block; b += kAtOnce)
    score_blocks<K, Queries, kAtOnce>(q, kv, head_dim, b, end_block, scale_lanes, scores + 16 * (b - first_block),
                                      stride);
  for (; b < end_block; ++b)
    score_blocks<K, Queries, 1>(q, kv, head_dim, b, end_block, scale_lanes, scores + 16 * (b - first_block), stride);

  float* used = scores + (first - 16 * first_block);
  const int32_t n = last - first;
  float inverse[Queries];
  for (int32_t j = 0; j < Queries; ++j) {
    float* weights = used + j * stride;
    inverse[j] = 1.0f / exponentiate(weights, n);
    if constexpr (K == KvCodes::kI8) {
      for (int32_t p = 0; p < n; ++p) weights[p] *= kv.v_scale[first + p];
    }
  }

  const uint8_t* rows = kv.v + static_cast<int64_t>(first) * head_dim * kBytes;
  const int32_t whole = head_dim / 16 * 16;  // chunks; the rest is short of one
  std::memset(out, 0, static_cast<size_t>(Queries * head_dim) * sizeof(float));
  for (int32_t begin = 0; begin < n; begin += kPositionsAhead) {  // strips, whose rows stay in L1 for all chunks
    const int32_t end = begin + kPositionsAhead < n ? begin + kPositionsAhead : n;
    int32_t i = 0;
    for (; i + 16 * kAtOnce <= whole; i += 16 * kAtOnce)
      weighted_sum<K, Queries, kAtOnce>(used, stride, rows + i * kBytes, head_dim, begin, end, n, out + i);
    for (; i < whole; i += 16)
      weighted_sum<K, Queries, 1>(used, stride, rows + i * kBytes, head_dim, begin, end, n, out + i);
  }
  for (int32_t j = 0; j < Queries; ++j, used += stride, out += head_dim) {
    const F inverse_lanes = set1(inverse[j]);
    for (int32_t i = 0; i < whole; i += 16) store(out + i, mul(load(out + i), inverse_lanes));
    if (whole == head_dim) continue;
    uint8_t codes[64] = {};
    F acc = set1(0.0f);
    for (int32_t p = 0; p < n; ++p) {
      std::memcpy(codes, rows + (static_cast<int64_t>(p) * head_dim + whole) * kBytes,
                  static_cast<size_t>((head_dim - whole) * kBytes));
      acc = fma(set1(used[p]), load_kv<K>(codes), acc);
    }
    store_partial(out + whole, head_dim - whole, mul(acc, inverse_lanes));
  }
}
template <KvCodes K>
inline void attend_as(const float* q, int32_t n_queries, const KvHead& kv, int32_t head_dim, int32_t first,
                      int32_t last, float scale, float* scores, float* out) {
  for (; n_queries > 0; n_queries -= kMaxQueries, q += kMaxQueries * head_dim, out += kMaxQueries * head_dim) {
    unrolled<kMaxQueries>(DIPPER_EACH {
      if (n_queries == k + 1 || (k + 1 == kMaxQueries && n_queries > kMaxQueries))
        attend_together<K, k + 1>(q, kv, head_dim, first, last, scale, scores, out);
    });
  }
}
void attend(const float* q, int32_t n_queries, const KvHead& kv, int32_t head_dim, int32_t first, int32_t last,
            float scale, float* scores, float* out) {
  switch (kv.codes) {
    case KvCodes::kF32:
      return attend_as<KvCodes::kF32>(q, n_queries, kv, head_dim, first, last, scale, scores, out);
    case KvCodes::kF16:
      return attend_as<KvCodes::kF16>(q, n_queries, kv, head_dim, first, last, scale, scores, out);
    default:
      return attend_as<KvCodes::kI8>(q, n_queries, kv, head_dim, first, last, scale, scores, out);
  }
}

double log_sum_exp(const float* x, int32_t n) {
  F top = set1(-3.0e38f);
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) top = max(load(x + i), top);
  if (i < n) top = max(load_partial(x + i, n - i, -3.0e38f), top);
  const float shift = reduce_max(top);
  double sum = 0.0;
  for (i = 0; i < n; i += 256) {  // short fp32 sums, then double: 150k terms lose nothing
    F part = set1(0.0f);
    const int32_t end = i + 256 < n ? i + 256 : n;
    int32_t j = i;
    for (; j + 16 <= end; j += 16) part = add(part, exp(sub(load(x + j), set1(shift))));
    if (j < end) part = add(part, exp(sub(load_partial(x + j, end - j, -3.0e38f), set1(shift))));
    sum += static_cast<double>(reduce_add(part));
  }
  return static_cast<double>(shift) + __builtin_log(sum);
}

}  // namespace

extern const Kernels table;
const Kernels table{DIPPER_ISA_NAME, quantise,       gemv_block_any, gemv_tiled_any, gemm_block_any,
                    gemm_tiled_any,  gemv_split_any, gemm_split_any, rms_norm,       add_to,
                    silu_mul,        gelu_tanh_mul,  keep,           attend,         log_sum_exp};

}  // namespace dipper::DIPPER_ISA
