// Sixteen fp32 lanes on three instruction sets. Included by one translation unit an ISA, which defines DIPPER_ISA (the
// namespace) and DIPPER_ISA_AVX512 / DIPPER_ISA_AVX2 / neither. No standard templates here: their code would be shared
// across ISAs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(DIPPER_ISA_AVX512) || defined(DIPPER_ISA_AVX2)
#include <immintrin.h>
#else
#include "half.hpp"
#endif

namespace dipper::DIPPER_ISA {

#if defined(DIPPER_ISA_AVX512)

using F = __m512;                        // 16 floats
using I = __m512i;                       // 16 u32
inline constexpr int kFieldsAtOnce = 8;  // of a tile, whose accumulators fit in registers

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline F load_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F load_bf16(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline I lanes_u32(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline I lanes_u16(const uint8_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline I lanes_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline F exp2_int(F n) {  // 2^n for integral n
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// Field k of the lanes as floats. A permute reads only the low bits of each index, so the fields above need no masking.
inline F field4(I lanes, int k) {
  const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 4 * k), table);
}
inline F field5(I low, I high, int k) {
  const F table0 = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const F table1 = _mm512_setr_ps(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  const I bit = k <= 4 ? _mm512_slli_epi32(high, 4 - k) : _mm512_srli_epi32(high, k - 4);
  // 0xCA selects by mask: bit 4 from the high plane, the rest from the low one.
  const I idx = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x10), bit, _mm512_srli_epi32(low, 4 * k), 0xCA);
  return _mm512_permutex2var_ps(table0, idx, table1);
}
inline F field6(I low, I high, int k) {
  const I two = 2 * k <= 4 ? _mm512_slli_epi32(high, 4 - 2 * k) : _mm512_srli_epi32(high, 2 * k - 4);
  const I mixed = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x30), two, _mm512_srli_epi32(low, 4 * k), 0xCA);
  return _mm512_cvtepi32_ps(_mm512_and_si512(mixed, _mm512_set1_epi32(0x3F)));
}

#elif defined(DIPPER_ISA_AVX2)

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
inline constexpr int kFieldsAtOnce = 4;

inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline F set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline I lanes_u32(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline I lanes_u16(const uint8_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
inline I lanes_u8(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
inline F load_u8(const uint8_t* p) { return to_float(lanes_u8(p)); }
inline F load_i8(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128((const __m128i*)p);
  return to_float({_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))});
}
inline F load_f16(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
inline F load_bf16(const void* p) {
  const I v = lanes_u16((const uint8_t*)p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(v.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(v.b, 16))};
}
inline F exp2_int(F n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.a), bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.b), bias), 23))};
}
inline I shift_right(I v, int n) { return {_mm256_srli_epi32(v.a, n), _mm256_srli_epi32(v.b, n)}; }
inline I shift_left(I v, int n) { return {_mm256_slli_epi32(v.a, n), _mm256_slli_epi32(v.b, n)}; }
inline I bits_and(I v, int mask) {
  const __m256i m = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)};
}
inline I bits_or(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }

#else  // scalar reference

struct F {
  float v[16];
};
struct I {
  uint32_t v[16];
};
inline constexpr int kFieldsAtOnce = 4;

#define DIPPER_LANES(expr)                      \
  F r;                                          \
  for (int i = 0; i < 16; ++i) r.v[i] = (expr); \
  return r
#define DIPPER_INT_LANES(expr)                  \
  I r;                                          \
  for (int i = 0; i < 16; ++i) r.v[i] = (expr); \
  return r

inline F load(const float* p) { DIPPER_LANES(p[i]); }
inline void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
inline F set1(float x) { DIPPER_LANES(x); }
inline F fma(F a, F b, F c) { DIPPER_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
inline F mul(F a, F b) { DIPPER_LANES(a.v[i] * b.v[i]); }
inline F add(F a, F b) { DIPPER_LANES(a.v[i] + b.v[i]); }
inline F sub(F a, F b) { DIPPER_LANES(a.v[i] - b.v[i]); }
inline F div(F a, F b) { DIPPER_LANES(a.v[i] / b.v[i]); }
inline F max(F a, F b) { DIPPER_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }  // as x86: b where either is NaN
inline F min(F a, F b) { DIPPER_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F load_u8(const uint8_t* p) { DIPPER_LANES(static_cast<float>(p[i])); }
inline F load_i8(const uint8_t* p) { DIPPER_LANES(static_cast<float>(static_cast<int8_t>(p[i]))); }
inline I lanes_u32(const uint8_t* p) {
  I r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline I lanes_u16(const uint8_t* p) {
  uint16_t t[16];
  std::memcpy(t, p, sizeof t);
  DIPPER_INT_LANES(t[i]);
}
inline I lanes_u8(const uint8_t* p) { DIPPER_INT_LANES(p[i]); }
inline F load_f16(const void* p) {
  uint16_t t[16];
  std::memcpy(t, p, sizeof t);
  DIPPER_LANES(half_to_float(t[i]));
}
inline F load_bf16(const void* p) {
  I lanes = lanes_u16(static_cast<const uint8_t*>(p));
  for (uint32_t& lane : lanes.v) lane <<= 16;
  F r;
  std::memcpy(r.v, lanes.v, sizeof r.v);
  return r;
}
inline F exp2_int(F n) {
  I bits;
  for (int i = 0; i < 16; ++i) bits.v[i] = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
  F r;
  std::memcpy(r.v, bits.v, sizeof r.v);
  return r;
}
inline F to_float(I x) { DIPPER_LANES(static_cast<float>(x.v[i])); }
inline I shift_right(I x, int n) { DIPPER_INT_LANES(x.v[i] >> n); }
inline I shift_left(I x, int n) { DIPPER_INT_LANES(x.v[i] << n); }
inline I bits_and(I x, uint32_t mask) { DIPPER_INT_LANES(x.v[i] & mask); }
inline I bits_or(I x, I y) { DIPPER_INT_LANES(x.v[i] | y.v[i]); }
#undef DIPPER_LANES
#undef DIPPER_INT_LANES

#endif

#if !defined(DIPPER_ISA_AVX512)
inline F field4(I lanes, int k) { return to_float(bits_and(shift_right(lanes, 4 * k), 0xF)); }
inline F field5(I low, I high, int k) {
  return to_float(bits_or(bits_and(shift_right(low, 4 * k), 0xF), shift_left(bits_and(shift_right(high, k), 1), 4)));
}
inline F field6(I low, I high, int k) {
  return to_float(
      bits_or(bits_and(shift_right(low, 4 * k), 0xF), shift_left(bits_and(shift_right(high, 2 * k), 3), 4)));
}
#endif

// Sum and maximum of the lanes by one fixed tree.
inline float reduce_add(F v) {
  float t[16];
  store(t, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) t[i] = t[i] + t[i + half];
  }
  return t[0];
}
inline float reduce_max(F v) {
  float t[16];
  store(t, v);
  for (int i = 1; i < 16; ++i) t[0] = t[i] > t[0] ? t[i] : t[0];
  return t[0];
}
// The first n < 16 values, `fill` in the other lanes.
inline F load_partial(const float* p, int n, float fill) {
  float t[16];
  for (int i = 0; i < 16; ++i) t[i] = i < n ? p[i] : fill;
  return load(t);
}
inline void store_partial(float* p, int n, F v) {
  float t[16];
  store(t, v);
  std::memcpy(p, t, static_cast<size_t>(n) * sizeof(float));
}

}  // namespace dipper::DIPPER_ISA
