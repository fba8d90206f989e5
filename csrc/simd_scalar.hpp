// The lanes of simd.hpp in arrays: the reference.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.hpp"

namespace dipper::DIPPER_ISA {

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
inline void store_f16(void* p, F x) {
  uint16_t t[16];
  for (int i = 0; i < 16; ++i) t[i] = float_to_half(x.v[i]);
  std::memcpy(p, t, sizeof t);
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
inline I bits_from(I a, uint32_t mask_a, I b, uint32_t mask_b) {
  return bits_or(bits_and(a, mask_a), bits_and(b, mask_b));
}
#undef DIPPER_LANES
#undef DIPPER_INT_LANES

}  // namespace dipper::DIPPER_ISA
