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
inline I load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
inline I set1(int32_t v) { return _mm512_set1_epi32(v); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I max_signed(I a, I b) { return _mm512_max_epi32(a, b); }
inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }
inline I to_int(F v) { return _mm512_cvtps_epi32(v); }
inline I lanes_i8(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline void store_i16(int16_t* p, I v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v)); }
inline I magnitude_bits(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)); }
inline I shift_right(I v, int n) { return _mm512_srli_epi32(v, n); }
inline I shift_right_signed(I v, int n) { return _mm512_srai_epi32(v, n); }
inline I shift_left(I v, int n) { return _mm512_slli_epi32(v, n); }
inline I bits_and(I v, uint32_t mask) { return _mm512_and_si512(v, _mm512_set1_epi32(mask)); }
// (a & mask_a) | (b & mask_b) of masks that share no bit; 0xCA selects by its first operand.
inline I bits_from(I a, uint32_t mask_a, I b, uint32_t mask_b) {
  return bits_and(_mm512_ternarylogic_epi32(_mm512_set1_epi32(mask_b), b, a, 0xCA), mask_a | mask_b);
}
inline I lower_halves(I a, I b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xFFFF), a, _mm512_slli_epi32(b, 16), 0xCA);
}
inline I upper_halves(I a, I b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xFFFF), _mm512_srli_epi32(a, 16), b, 0xCA);
}
inline I dot(I a, I b, I sum) { return _mm512_dpwssd_epi32(sum, a, b); }

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
inline I load(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
inline void store(int32_t* p, I v) {
  _mm256_storeu_si256((__m256i*)p, v.a);
  _mm256_storeu_si256((__m256i*)(p + 8), v.b);
}
inline I set1(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I max_signed(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline I to_int(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
inline void store_i16(int16_t* p, I v) {
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xD8));
}
inline I magnitude_bits(F v) {
  const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
  return {_mm256_and_si256(_mm256_castps_si256(v.a), mask), _mm256_and_si256(_mm256_castps_si256(v.b), mask)};
}
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
inline I lanes_i8(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
inline F load_i8(const uint8_t* p) { return to_float(lanes_i8(p)); }
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
inline I shift_right_signed(I v, int n) { return {_mm256_srai_epi32(v.a, n), _mm256_srai_epi32(v.b, n)}; }
inline I shift_left(I v, int n) { return {_mm256_slli_epi32(v.a, n), _mm256_slli_epi32(v.b, n)}; }
inline I bits_and(I v, uint32_t mask) {
  const __m256i m = _mm256_set1_epi32(static_cast<int>(mask));
  return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)};
}
inline I lower_halves(I x, I y) {
  return {_mm256_blend_epi16(x.a, _mm256_slli_epi32(y.a, 16), 0xAA),
          _mm256_blend_epi16(x.b, _mm256_slli_epi32(y.b, 16), 0xAA)};
}
inline I upper_halves(I x, I y) {
  return {_mm256_blend_epi16(_mm256_srli_epi32(x.a, 16), y.a, 0xAA),
          _mm256_blend_epi16(_mm256_srli_epi32(x.b, 16), y.b, 0xAA)};
}
inline I dot(I x, I y, I sum) {
  return {_mm256_add_epi32(_mm256_madd_epi16(x.a, y.a), sum.a), _mm256_add_epi32(_mm256_madd_epi16(x.b, y.b), sum.b)};
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
inline I load(const int32_t* p) {
  I r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store(int32_t* p, I x) { std::memcpy(p, x.v, sizeof x.v); }
inline int32_t as_signed(uint32_t bits) { return static_cast<int32_t>(bits); }
inline I set1(int32_t x) { DIPPER_INT_LANES(static_cast<uint32_t>(x)); }
inline I add(I a, I b) { DIPPER_INT_LANES(a.v[i] + b.v[i]); }
inline I sub(I a, I b) { DIPPER_INT_LANES(a.v[i] - b.v[i]); }
inline I max_signed(I a, I b) { DIPPER_INT_LANES(as_signed(a.v[i]) > as_signed(b.v[i]) ? a.v[i] : b.v[i]); }
inline F to_float(I x) { DIPPER_LANES(static_cast<float>(as_signed(x.v[i]))); }
inline I to_int(F x) { DIPPER_INT_LANES(static_cast<uint32_t>(static_cast<int32_t>(__builtin_rintf(x.v[i])))); }
inline I lanes_i8(const uint8_t* p) { DIPPER_INT_LANES(static_cast<uint32_t>(static_cast<int8_t>(p[i]))); }
inline void store_i16(int16_t* p, I x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(x.v[i]);
}
inline I magnitude_bits(F x) {
  I r;
  std::memcpy(r.v, x.v, sizeof r.v);
  for (uint32_t& lane : r.v) lane &= 0x7FFFFFFFu;
  return r;
}
inline I shift_right(I x, int n) { DIPPER_INT_LANES(x.v[i] >> n); }
inline I shift_right_signed(I x, int n) { DIPPER_INT_LANES(static_cast<uint32_t>(as_signed(x.v[i]) >> n)); }
inline I lower_halves(I x, I y) { DIPPER_INT_LANES((x.v[i] & 0xFFFFu) | (y.v[i] << 16)); }
inline I upper_halves(I x, I y) { DIPPER_INT_LANES((x.v[i] >> 16) | (y.v[i] & 0xFFFF0000u)); }
inline int32_t lower_half(uint32_t x) { return static_cast<int16_t>(x & 0xFFFFu); }
inline int32_t upper_half(uint32_t x) { return static_cast<int16_t>(x >> 16); }
inline I dot(I x, I y, I sum) {
  DIPPER_INT_LANES(sum.v[i] + static_cast<uint32_t>(lower_half(x.v[i]) * lower_half(y.v[i]) +
                                                    upper_half(x.v[i]) * upper_half(y.v[i])));
}
inline I shift_left(I x, int n) { DIPPER_INT_LANES(x.v[i] << n); }
inline I bits_and(I x, uint32_t mask) { DIPPER_INT_LANES(x.v[i] & mask); }
inline I bits_or(I x, I y) { DIPPER_INT_LANES(x.v[i] | y.v[i]); }
#undef DIPPER_LANES
#undef DIPPER_INT_LANES

#endif

#if !defined(DIPPER_ISA_AVX512)
inline I bits_from(I a, uint32_t mask_a, I b, uint32_t mask_b) {
  return bits_or(bits_and(a, mask_a), bits_and(b, mask_b));
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
inline int32_t reduce_add(I v) {
  int32_t t[16];
  store(t, v);
  for (int i = 1; i < 16; ++i) t[0] += t[i];
  return t[0];
}
inline int32_t reduce_max(I v) {
  int32_t t[16];
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
