// The kernels, written once over the lanes of simd.hpp. A translation unit an ISA includes this and exports `table`.
//
// Numbers: within a block acc = fma(code, x, acc) over the columns in ascending order; then, once per block,
// y = fma(s, acc - zero_point * sum_x, y) and, where the grid has offsets, y = fma(m, sum_x, y). Float codes have no
// block step: y = fma(w, x, y).
#include "kernels.hpp"
#include "simd.hpp"

// Lanes must stay in registers; the scalar reference has none to lose, and inlining it costs minutes of compile time.
#if defined(DIPPER_ISA_AVX512) || defined(DIPPER_ISA_AVX2)
#define DIPPER_INLINE inline __attribute__((always_inline))
#else
#define DIPPER_INLINE inline
#endif

namespace dipper::DIPPER_ISA {
namespace {

constexpr bool is_float(Codes c) { return c == Codes::kF16 || c == Codes::kBF16 || c == Codes::kF32; }

// Fields [K0, K0 + KN) of one tile of a column, as floats. p0, p1: the tile in planes 0 and 1.
template <Codes C, int K0, int KN, bool Half>
DIPPER_INLINE void decode(const uint8_t* p0, const uint8_t* p1, F (&out)[KN]) {
  if constexpr (C == Codes::kQ4) {
    const I low = Half ? lanes_u16(p0) : lanes_u32(p0);
    for (int k = 0; k < KN; ++k) out[k] = field4(low, K0 + k);
  } else if constexpr (C == Codes::kQ5) {
    const I low = Half ? lanes_u16(p0) : lanes_u32(p0);
    const I high = lanes_u8(p1);
    for (int k = 0; k < KN; ++k) out[k] = field5(low, high, K0 + k);
  } else if constexpr (C == Codes::kQ6) {
    const I low = Half ? lanes_u16(p0) : lanes_u32(p0);
    const I high = Half ? lanes_u8(p1) : lanes_u16(p1);
    for (int k = 0; k < KN; ++k) out[k] = field6(low, high, K0 + k);
  } else if constexpr (C == Codes::kQ8) {
    for (int k = 0; k < KN; ++k) out[k] = load_i8(p0 + 16 * (K0 + k));
  } else if constexpr (C == Codes::kF16) {
    for (int k = 0; k < KN; ++k) out[k] = load_f16(p0 + 32 * (K0 + k));
  } else if constexpr (C == Codes::kBF16) {
    for (int k = 0; k < KN; ++k) out[k] = load_bf16(p0 + 32 * (K0 + k));
  } else {
    for (int k = 0; k < KN; ++k) out[k] = load(reinterpret_cast<const float*>(p0) + 16 * (K0 + k));
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

// y += s * (acc - zero_point * sum_x) + m * sum_x for 16 rows.
template <Scale S>
DIPPER_INLINE F apply_scale(const WeightView& w, ScaleAt at, int row, F acc, F sum_x, F zero_point, F y) {
  y = fma(scale_of<S>(w, at, row), fma(zero_point, sum_x, acc), y);
  if constexpr (S == Scale::kF16M) {
    y = fma(load_f16(w.dm + at.block + row), sum_x, y);
  } else if constexpr (S == Scale::kU8M) {
    const F m = mul(load_f16(w.dm + at.super + row), load_u8(w.subm + at.block + row));
    y = fma(sub(set1(0.0f), m), sum_x, y);
  }
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

// acc[fields] = fma(code, x, acc) over n columns, ascending.
template <Codes C, int K0, int KN, bool Half, bool Strided>
DIPPER_INLINE void accumulate(const Columns<Strided>& columns, int32_t n, const float* x, F (&acc)[KN]) {
  for (int32_t i = 0; i < n; ++i) {
    const uint8_t* column = columns.at(i);
    F code[KN];
    decode<C, K0, KN, Half>(column + columns.offset[0], column + columns.offset[1], code);
    const F xi = set1(x[i]);
    for (int k = 0; k < KN; ++k) acc[k] = fma(code[k], xi, acc[k]);
  }
}

template <Codes C, Scale S, int K0, int KN, bool Half>
DIPPER_INLINE void tile_part(const WeightView& w, const Columns<true>& columns, int32_t n, const float* x, float sum_x,
                             ScaleAt at, float* y) {
  F acc[KN];
  for (int k = 0; k < KN; ++k) acc[k] = is_float(C) ? load(y + 16 * (K0 + k)) : set1(0.0f);
  accumulate<C, K0, KN, Half>(columns, n, x, acc);
  const F zero_point = set1(static_cast<float>(-w.grid.zero_point));
  for (int k = 0; k < KN; ++k) {
    const int row = 16 * (K0 + k);
    store(y + row, is_float(C) ? acc[k] : apply_scale<S>(w, at, row, acc[k], set1(sum_x), zero_point, load(y + row)));
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

// The next columns after those at hand, to be fetched into the CPU's caches.
struct Ahead {
  const uint8_t* record[4];
  int64_t offset[2];  // from the tile at hand to theirs, planes 0 and 1 (0: the same tile of another record)
};

// acc[tiles] += columns * x for up to four columns at once: four sequential streams, which the hardware's prefetchers
// follow and a line a column asked for by hand leads; dozens of records tile by tile they do not.
template <Codes C, int K0, int KN, bool Half, int N>
DIPPER_INLINE void strip_part(const Columns<false>& columns, const float* x, bool fresh, float* acc) {
  F sum[KN];
  for (int k = 0; k < KN; ++k) sum[k] = fresh ? set1(0.0f) : load(acc + 16 * (K0 + k));
  accumulate<C, K0, KN, Half>(columns, N, x, sum);
  for (int k = 0; k < KN; ++k) store(acc + 16 * (K0 + k), sum[k]);
}

// Which half tiles of a tile lie in [begin, end): threads share rows by half tiles, since small matrices have few
// tiles.
struct Halves {
  bool lower, upper;
};
inline Halves halves_of(int32_t tile, int32_t begin, int32_t end) {
  return {2 * tile >= begin && 2 * tile < end, 2 * tile + 1 >= begin && 2 * tile + 1 < end};
}

template <Codes C, int N>
DIPPER_INLINE void strip(const WeightView& w, const uint8_t* const* record, const float* x, int32_t begin, int32_t end,
                         bool fresh, const Ahead& ahead, float* acc) {
  for (int32_t t = begin / 2; 2 * t < end; ++t, acc += kTileRows) {
    const Halves halves = halves_of(t, begin, end);
    const Columns<false> columns = record_columns<C>(w, record, t);
    for (const uint8_t* next : ahead.record) {
      __builtin_prefetch(next + columns.offset[0] + ahead.offset[0]);
      if (plane_tile_bytes(C, 1, false) != 0 && t % 4 == 0)
        __builtin_prefetch(next + columns.offset[1] + ahead.offset[1]);
      for (int32_t line = 64; line < plane_tile_bytes(C, 0, false); line += 64)
        __builtin_prefetch(next + columns.offset[0] + ahead.offset[0] + line);
    }
    if (tile_rows(w, t) == kHalfTileRows) {
      strip_part<C, 0, 4, true, N>(columns, x, fresh, acc);
    } else if (kFieldsAtOnce == 8 && halves.lower && halves.upper) {
      strip_part<C, 0, 8, false, N>(columns, x, fresh, acc);
    } else {
      if (halves.lower) strip_part<C, 0, 4, false, N>(columns, x, fresh, acc);
      if (halves.upper) strip_part<C, 4, 4, false, N>(columns, x, fresh, acc);
    }
  }
}

template <Codes C, Scale S>
void gemv_block(const WeightView& w, const BlockColumns& c, int32_t half_begin, int32_t half_end, float* y) {
  constexpr int32_t kStripHalves = 48;
  alignas(64) float sums[(kStripHalves / 2 + 1) * kTileRows];
  for (int32_t begin = half_begin; begin < half_end; begin += kStripHalves) {
    const int32_t end = begin + kStripHalves < half_end ? begin + kStripHalves : half_end;
    float* acc = is_float(C) ? y + begin / 2 * kTileRows : sums;
    for (int32_t i = 0; i < c.n;) {
      const int32_t n = c.n - i < 4 ? c.n - i : 4;
      // After these columns come the next ones; after the last the first again, a strip on, or those of the next block.
      const int32_t next = i + n + 4;  // the four after the next four: time for a DRAM access
      const bool turns = next >= c.n;
      const bool is_next_block = turns && end >= half_end;
      const int32_t to_tile = !turns ? 0 : is_next_block ? (half_begin - begin) / 2 : kStripHalves / 2;
      Ahead ahead{{},
                  {static_cast<int64_t>(to_tile) * plane_tile_bytes(C, 0, false),
                   static_cast<int64_t>(to_tile) * plane_tile_bytes(C, 1, false)}};
      const uint8_t* const* from = is_next_block && c.n_next > 0 ? c.next_record : c.record;
      const int32_t n_from = is_next_block && c.n_next > 0 ? c.n_next : c.n;
      for (int32_t j = 0; j < 4; ++j) {
        const int32_t at = (turns ? next - c.n : next) + j;
        ahead.record[j] = from[at < n_from ? at : n_from - 1];
      }
      const bool fresh = !is_float(C) && i == 0;
      switch (n) {
        case 4:
          strip<C, 4>(w, c.record + i, c.x + i, begin, end, fresh, ahead, acc);
          break;
        case 3:
          strip<C, 3>(w, c.record + i, c.x + i, begin, end, fresh, ahead, acc);
          break;
        case 2:
          strip<C, 2>(w, c.record + i, c.x + i, begin, end, fresh, ahead, acc);
          break;
        default:
          strip<C, 1>(w, c.record + i, c.x + i, begin, end, fresh, ahead, acc);
      }
      i += n;
    }
    if constexpr (!is_float(C)) {
      const F zero_point = set1(static_cast<float>(-w.grid.zero_point));
      for (int32_t t = begin / 2; 2 * t < end; ++t, acc += kTileRows) {
        const Halves halves = halves_of(t, begin, end);
        const int32_t rows = tile_rows(w, t);
        const ScaleAt at = scale_at(w, t, rows, c.block);
        float* out = y + t * kTileRows;
        const int32_t last = halves.upper ? rows : kHalfTileRows;
        for (int32_t row = halves.lower ? 0 : kHalfTileRows; row < last; row += 16) {
          store(out + row, apply_scale<S>(w, at, row, load(acc + row), set1(c.sum_x), zero_point, load(out + row)));
        }
      }
    }
  }
}

template <Codes C, Scale S>
void gemv_tiled(const WeightView& w, const float* x, const float* sum_x, int32_t half_begin, int32_t half_end,
                float* y) {
  for (int32_t t = half_begin / 2; 2 * t < half_end; ++t) {
    const Halves halves = halves_of(t, half_begin, half_end);
    const int32_t rows = tile_rows(w, t);
    const bool half = rows == kHalfTileRows;
    for (int32_t b = 0; b < w.n_blocks; ++b) {
      const int32_t first = b * w.grid.group;
      const int32_t n = w.n_cols - first < w.grid.group ? w.n_cols - first : w.grid.group;
      const Columns<true> columns = tiled_columns<C>(w, t, b, half);
      const ScaleAt at = scale_at(w, t, rows, b);
      float* out = y + t * kTileRows;
      if (half) {
        tile_part<C, S, 0, 4, true>(w, columns, n, x + first, sum_x[b], at, out);
      } else if (kFieldsAtOnce == 8 && halves.lower && halves.upper) {
        tile_part<C, S, 0, 8, false>(w, columns, n, x + first, sum_x[b], at, out);
      } else {
        if (halves.lower) tile_part<C, S, 0, 4, false>(w, columns, n, x + first, sum_x[b], at, out);
        if (halves.upper) tile_part<C, S, 4, 4, false>(w, columns, n, x + first, sum_x[b], at, out);
      }
    }
  }
}

// Several tokens: the block's codes are decoded once into L1, then multiplied register-blocked (Rows x Tokens
// accumulators).
template <Codes C, Scale S, int Rows, int Tokens>
DIPPER_INLINE void multiply(const WeightView& w, const float* codes, int32_t n, const float* x, int64_t x_stride,
                            const float* sum_x, int64_t sum_stride, ScaleAt at, int32_t row, float* y,
                            int64_t y_stride) {
  F acc[Tokens][Rows];
  for (int t = 0; t < Tokens; ++t) {
    for (int r = 0; r < Rows; ++r) acc[t][r] = is_float(C) ? load(y + t * y_stride + row + 16 * r) : set1(0.0f);
  }
  for (int32_t i = 0; i < n; ++i) {
    F code[Rows];
    for (int r = 0; r < Rows; ++r) code[r] = load(codes + i * kTileRows + row + 16 * r);
    for (int t = 0; t < Tokens; ++t) {
      const F xi = set1(x[t * x_stride + i]);
      for (int r = 0; r < Rows; ++r) acc[t][r] = fma(code[r], xi, acc[t][r]);
    }
  }
  const F zero_point = set1(static_cast<float>(-w.grid.zero_point));
  for (int t = 0; t < Tokens; ++t) {
    for (int r = 0; r < Rows; ++r) {
      float* out = y + t * y_stride + row + 16 * r;
      if constexpr (is_float(C)) {
        store(out, acc[t][r]);
      } else {
        store(out, apply_scale<S>(w, at, row + 16 * r, acc[t][r], set1(sum_x[t * sum_stride]), zero_point, load(out)));
      }
    }
  }
}

template <Codes C, Scale S, bool Strided>
void gemm_tile(const WeightView& w, const Columns<Strided>& columns, const BlockTokens& c, ScaleAt at, bool half,
               float* y, int64_t y_stride) {
  alignas(64) float codes[kMaxGroup * kTileRows];
  for (int32_t i = 0; i < c.n; ++i) {
    const uint8_t* column = columns.at(i);
    const uint8_t* p0 = column + columns.offset[0];
    const uint8_t* p1 = column + columns.offset[1];
    F lanes[4];
    if (half) {
      decode<C, 0, 4, true>(p0, p1, lanes);
      for (int k = 0; k < 4; ++k) store(codes + i * kTileRows + 16 * k, lanes[k]);
    } else {
      decode<C, 0, 4, false>(p0, p1, lanes);
      for (int k = 0; k < 4; ++k) store(codes + i * kTileRows + 16 * k, lanes[k]);
      decode<C, 4, 4, false>(p0, p1, lanes);
      for (int k = 0; k < 4; ++k) store(codes + i * kTileRows + 64 + 16 * k, lanes[k]);
    }
  }
  constexpr int kRows = kFieldsAtOnce == 8 ? 4 : 2;
  constexpr int kTokens = kFieldsAtOnce == 8 ? 6 : 3;
  const int32_t rows = half ? kHalfTileRows : kTileRows;
  for (int32_t row = 0; row < rows; row += 16 * kRows) {
    int32_t t = 0;
    for (; t + kTokens <= c.n_tokens; t += kTokens) {
      multiply<C, S, kRows, kTokens>(w, codes, c.n, c.x + t * c.x_stride, c.x_stride, c.sum_x + t * c.sum_stride,
                                     c.sum_stride, at, row, y + t * y_stride, y_stride);
    }
    for (; t < c.n_tokens; ++t) {
      multiply<C, S, kRows, 1>(w, codes, c.n, c.x + t * c.x_stride, c.x_stride, c.sum_x + t * c.sum_stride,
                               c.sum_stride, at, row, y + t * y_stride, y_stride);
    }
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
void gemm_tiled(const WeightView& w, const float* x, int64_t x_stride, const float* sum_x, int64_t sum_stride,
                int32_t n_tokens, int32_t tile_begin, int32_t tile_end, float* y, int64_t y_stride) {
  for (int32_t t = tile_begin; t < tile_end; ++t) {
    const int32_t rows = tile_rows(w, t);
    const bool half = rows == kHalfTileRows;
    for (int32_t b = 0; b < w.n_blocks; ++b) {
      const int32_t first = b * w.grid.group;
      const int32_t n = w.n_cols - first < w.grid.group ? w.n_cols - first : w.grid.group;
      const BlockTokens c{b, n, nullptr, x + first, x_stride, sum_x + b, sum_stride, n_tokens};
      gemm_tile<C, S, true>(w, tiled_columns<C>(w, t, b, half), c, scale_at(w, t, rows, b), half, y + t * kTileRows,
                            y_stride);
    }
  }
}

// Runs fn.template operator()<codes, scale>() for the grids that bundles hold.
template <typename Fn>
inline void with_grid(const Grid& grid, Fn&& fn) {
  const auto with_scale = [&]<Codes C>() {
    switch (grid.scale) {
      case Scale::kF16:
        return fn.template operator()<C, Scale::kF16>();
      case Scale::kF16M:
        return fn.template operator()<C, Scale::kF16M>();
      case Scale::kU8:
        return fn.template operator()<C, Scale::kU8>();
      case Scale::kI8:
        return fn.template operator()<C, Scale::kI8>();
      default:
        return fn.template operator()<C, Scale::kU8M>();
    }
  };
  switch (grid.codes) {
    case Codes::kQ4:
      return with_scale.template operator()<Codes::kQ4>();
    case Codes::kQ5:
      return with_scale.template operator()<Codes::kQ5>();
    case Codes::kQ6:
      return with_scale.template operator()<Codes::kQ6>();
    case Codes::kQ8:
      return with_scale.template operator()<Codes::kQ8>();
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
void gemv_tiled_any(const WeightView& w, const float* x, const float* sum_x, int32_t half_begin, int32_t half_end,
                    float* y) {
  with_grid(w.grid, [&]<Codes C, Scale S>() { gemv_tiled<C, S>(w, x, sum_x, half_begin, half_end, y); });
}
void gemm_block_any(const WeightView& w, const BlockTokens& c, int32_t tile_begin, int32_t tile_end, float* y,
                    int64_t y_stride) {
  with_grid(w.grid, [&]<Codes C, Scale S>() { gemm_block<C, S>(w, c, tile_begin, tile_end, y, y_stride); });
}
void gemm_tiled_any(const WeightView& w, const float* x, int64_t x_stride, const float* sum_x, int64_t sum_stride,
                    int32_t n_tokens, int32_t tile_begin, int32_t tile_end, float* y, int64_t y_stride) {
  with_grid(w.grid, [&]<Codes C, Scale S>() {
    gemm_tiled<C, S>(w, x, x_stride, sum_x, sum_stride, n_tokens, tile_begin, tile_end, y, y_stride);
  });
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

// out[16 * Chunks] = sum over positions of p * v, ascending; several chunks at once hide the latency of fma.
template <int Chunks>
DIPPER_INLINE void weighted_sum(const float* p, const float* v, int32_t n, int32_t head_dim, F scale, float* out) {
  F acc[Chunks];
  for (int c = 0; c < Chunks; ++c) acc[c] = set1(0.0f);
  for (int32_t i = 0; i < n; ++i) {
    const F weight = set1(p[i]);
    for (int c = 0; c < Chunks; ++c)
      acc[c] = fma(weight, load(v + static_cast<int64_t>(i) * head_dim + 16 * c), acc[c]);
  }
  for (int c = 0; c < Chunks; ++c) store(out + 16 * c, mul(acc[c], scale));
}

void attend(const float* q, const float* k, const float* v, int32_t head_dim, int32_t first, int32_t last, float scale,
            float* scores, float* out) {
  const int32_t first_block = first / 16;
  const F scale_lanes = set1(scale);
  for (int32_t b = first_block; b * 16 < last; ++b) {  // lanes outside [first, last) are computed and not used
    const float* block = k + static_cast<int64_t>(b) * 16 * head_dim;
    F acc = set1(0.0f);
    for (int32_t i = 0; i < head_dim; ++i) acc = fma(set1(q[i]), load(block + 16 * i), acc);
    store(scores + (b - first_block) * 16, mul(acc, scale_lanes));
  }
  float* used = scores + (first - 16 * first_block);
  const int32_t n = last - first;
  const F inverse = set1(1.0f / exponentiate(used, n));
  const float* rows = v + static_cast<int64_t>(first) * head_dim;
  int32_t i = 0;
  for (; i + 64 <= head_dim; i += 64) weighted_sum<4>(used, rows + i, n, head_dim, inverse, out + i);
  for (; i + 16 <= head_dim; i += 16) weighted_sum<1>(used, rows + i, n, head_dim, inverse, out + i);
  if (i < head_dim) {
    F acc = set1(0.0f);
    for (int32_t p = 0; p < n; ++p) {
      acc = fma(set1(used[p]), load_partial(rows + static_cast<int64_t>(p) * head_dim + i, head_dim - i, 0.0f), acc);
    }
    store_partial(out + i, head_dim - i, mul(acc, inverse));
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
const Kernels table{DIPPER_ISA_NAME, gemv_block_any, gemv_tiled_any, gemm_block_any, gemm_tiled_any,
                    rms_norm,        silu_mul,       gelu_tanh_mul,  attend,         log_sum_exp};

}  // namespace dipper::DIPPER_ISA
