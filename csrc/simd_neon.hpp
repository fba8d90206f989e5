// The lanes of simd.hpp in four NEON registers, with what every ARMv8-A CPU has.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace dipper::DIPPER_ISA {

struct F {
  float32x4_t v[4];
};
struct I {
  uint32x4_t v[4];
};
inline constexpr int kFieldsAtOnce = 4;

// expr for i = 0 .. 3, each a constant: GCC keeps arrays in registers only then.
#define DIPPER_FOUR(type, expr) \
  type r;                       \
  {                             \
    constexpr int i = 0;        \
    r.v[i] = (expr);            \
  }                             \
  {                             \
    constexpr int i = 1;        \
    r.v[i] = (expr);            \
  }                             \
  {                             \
    constexpr int i = 2;        \
    r.v[i] = (expr);            \
  }                             \
  {                             \
    constexpr int i = 3;        \
    r.v[i] = (expr);            \
  }                             \
  return r
#define DIPPER_LANES(expr) DIPPER_FOUR(F, expr)
#define DIPPER_INT_LANES(expr) DIPPER_FOUR(I, expr)

inline int32x4_t as_signed(uint32x4_t x) { return vreinterpretq_s32_u32(x); }
inline uint32x4_t as_unsigned(int32x4_t x) { return vreinterpretq_u32_s32(x); }
inline int16x8_t as_halves(uint32x4_t x) { return vreinterpretq_s16_u32(x); }

inline F load(const float* p) { DIPPER_LANES(vld1q_f32(p + 4 * i)); }
inline void store(float* p, F x) {
  vst1q_f32(p, x.v[0]);
  vst1q_f32(p + 4, x.v[1]);
  vst1q_f32(p + 8, x.v[2]);
  vst1q_f32(p + 12, x.v[3]);
}
inline F set1(float x) { DIPPER_LANES(vdupq_n_f32(x)); }
inline F fma(F a, F b, F c) { DIPPER_LANES(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
inline F mul(F a, F b) { DIPPER_LANES(vmulq_f32(a.v[i], b.v[i])); }
inline F add(F a, F b) { DIPPER_LANES(vaddq_f32(a.v[i], b.v[i])); }
inline F sub(F a, F b) { DIPPER_LANES(vsubq_f32(a.v[i], b.v[i])); }
inline F div(F a, F b) { DIPPER_LANES(vdivq_f32(a.v[i], b.v[i])); }
// As x86, b where either is NaN or both are zero; vmaxq_f32 is not.
inline F max(F a, F b) { DIPPER_LANES(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline F min(F a, F b) { DIPPER_LANES(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }

inline I load(const int32_t* p) { DIPPER_INT_LANES(as_unsigned(vld1q_s32(p + 4 * i))); }
inline void store(int32_t* p, I x) {
  vst1q_s32(p, as_signed(x.v[0]));
  vst1q_s32(p + 4, as_signed(x.v[1]));
  vst1q_s32(p + 8, as_signed(x.v[2]));
  vst1q_s32(p + 12, as_signed(x.v[3]));
}
inline I set1(int32_t x) { DIPPER_INT_LANES(as_unsigned(vdupq_n_s32(x))); }
inline I add(I a, I b) { DIPPER_INT_LANES(vaddq_u32(a.v[i], b.v[i])); }
inline I max_signed(I a, I b) { DIPPER_INT_LANES(as_unsigned(vmaxq_s32(as_signed(a.v[i]), as_signed(b.v[i])))); }
inline F to_float(I x) { DIPPER_LANES(vcvtq_f32_s32(as_signed(x.v[i]))); }
inline I to_int(F x) { DIPPER_INT_LANES(as_unsigned(vcvtnq_s32_f32(x.v[i]))); }
inline void store_i16(int16_t* p, I x) {
  vst1q_s16(p, vuzp1q_s16(as_halves(x.v[0]), as_halves(x.v[1])));
  vst1q_s16(p + 8, vuzp1q_s16(as_halves(x.v[2]), as_halves(x.v[3])));
}
inline I magnitude_bits(F x) { DIPPER_INT_LANES(vreinterpretq_u32_f32(vabsq_f32(x.v[i]))); }

// Shifts by operator: one by a constant is then one instruction, which vshlq is not.
inline I shift_right(I x, int n) { DIPPER_INT_LANES(x.v[i] >> n); }
inline I shift_left(I x, int n) { DIPPER_INT_LANES(x.v[i] << n); }
inline I bits_and(I x, uint32_t mask) { DIPPER_INT_LANES(vandq_u32(x.v[i], vdupq_n_u32(mask))); }
// (a & mask_a) | (b & mask_b) of masks that share no bit.
inline I bits_from(I a, uint32_t mask_a, I b, uint32_t mask_b) {
  DIPPER_INT_LANES(vbslq_u32(vdupq_n_u32(mask_a), a.v[i], vandq_u32(b.v[i], vdupq_n_u32(mask_b))));
}
inline I lower_halves(I x, I y) { DIPPER_INT_LANES(vsliq_n_u32(x.v[i], y.v[i], 16)); }
inline I upper_halves(I x, I y) { DIPPER_INT_LANES(vsriq_n_u32(y.v[i], x.v[i], 16)); }

inline I lanes_u32(const uint8_t* p) { DIPPER_INT_LANES(vreinterpretq_u32_u8(vld1q_u8(p + 16 * i))); }
inline I widen(uint16x8_t low, uint16x8_t high) {
  return {{vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)}};
}
inline I lanes_u16(const uint8_t* p) {
  return widen(vreinterpretq_u16_u8(vld1q_u8(p)), vreinterpretq_u16_u8(vld1q_u8(p + 16)));
}
inline I lanes_u8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  return widen(vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
}
inline F load_u8(const uint8_t* p) { return to_float(lanes_u8(p)); }
inline I lanes_i8(const uint8_t* p) {
  const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes));
  const int16x8_t high = vmovl_high_s8(bytes);
  return {{as_unsigned(vmovl_s16(vget_low_s16(low))), as_unsigned(vmovl_high_s16(low)),
           as_unsigned(vmovl_s16(vget_low_s16(high))), as_unsigned(vmovl_high_s16(high))}};
}
inline F load_i8(const uint8_t* p) { return to_float(lanes_i8(p)); }
inline F load_f16(const void* p) {
  const float16x8_t low = vreinterpretq_f16_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
  const float16x8_t high = vreinterpretq_f16_u8(vld1q_u8(static_cast<const uint8_t*>(p) + 16));
  return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
           vcvt_high_f32_f16(high)}};
}
inline void store_f16(void* p, F v) {
  const float16x8_t low = vcvt_high_f16_f32(vcvt_f16_f32(v.v[0]), v.v[1]);
  const float16x8_t high = vcvt_high_f16_f32(vcvt_f16_f32(v.v[2]), v.v[3]);
  vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_f16(low));
  vst1q_u8(static_cast<uint8_t*>(p) + 16, vreinterpretq_u8_f16(high));
}
inline F load_bf16(const void* p) {
  const I bits = shift_left(lanes_u16(static_cast<const uint8_t*>(p)), 16);
  DIPPER_LANES(vreinterpretq_f32_u32(bits.v[i]));
}
inline F exp2_int(F n) {
  const I bits = shift_left(add(to_int(n), set1(127)), 23);
  DIPPER_LANES(vreinterpretq_f32_u32(bits.v[i]));
}

// Two registers at once, all lower halves in one and all upper ones in another: 6 instructions where products of pairs
// in place and their sums are 8, and halves of an operand that several products share are taken once.
inline void dot_two(uint32x4_t x0, uint32x4_t x1, uint32x4_t y0, uint32x4_t y1, uint32x4_t& sum0, uint32x4_t& sum1) {
  const int16x8_t lower_x = vuzp1q_s16(as_halves(x0), as_halves(x1));
  const int16x8_t upper_x = vuzp2q_s16(as_halves(x0), as_halves(x1));
  const int16x8_t lower_y = vuzp1q_s16(as_halves(y0), as_halves(y1));
  const int16x8_t upper_y = vuzp2q_s16(as_halves(y0), as_halves(y1));
  const int32x4_t lower0 = vmlal_s16(as_signed(sum0), vget_low_s16(lower_x), vget_low_s16(lower_y));
  const int32x4_t lower1 = vmlal_high_s16(as_signed(sum1), lower_x, lower_y);
  sum0 = as_unsigned(vmlal_s16(lower0, vget_low_s16(upper_x), vget_low_s16(upper_y)));
  sum1 = as_unsigned(vmlal_high_s16(lower1, upper_x, upper_y));
}
inline I dot(I x, I y, I sum) {
  dot_two(x.v[0], x.v[1], y.v[0], y.v[1], sum.v[0], sum.v[1]);
  dot_two(x.v[2], x.v[3], y.v[2], y.v[3], sum.v[2], sum.v[3]);
  return sum;
}
#undef DIPPER_LANES
#undef DIPPER_INT_LANES
#undef DIPPER_FOUR

}  // namespace dipper::DIPPER_ISA
