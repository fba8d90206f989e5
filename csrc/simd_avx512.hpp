// The lanes of simd.hpp in one AVX-512 register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace dipper::DIPPER_ISA {

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
inline void store_f16(void* p, F v) {  // infinity where f16 has no number that large
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
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
inline I max_signed(I a, I b) { return _mm512_max_epi32(a, b); }
inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }
inline I to_int(F v) { return _mm512_cvtps_epi32(v); }
inline I lanes_i8(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline void store_i16(int16_t* p, I v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v)); }
inline I magnitude_bits(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)); }
inline I shift_right(I v, int n) { return _mm512_srli_epi32(v, n); }
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

}  // namespace dipper::DIPPER_ISA
