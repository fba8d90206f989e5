// IEEE binary16 to binary32 and back without instructions that a baseline CPU may lack.
#pragma once

#include <cstdint>
#include <cstring>

namespace dipper {

// static, not inline: translation units built for different ISAs must not share its code.
static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu;
  const uint32_t mantissa = half & 0x3FFu;
  if (exponent == 0) {
    const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
  }
  const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded to the nearest, ties to even; infinity where binary16 has no number that large.
static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | ((bits >> 13) & 0x1FFu));
  if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (bits < 0x38800000u) {  // subnormal: in units of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_rintf(magnitude * 0x1p24f)));
  }
  const uint32_t odd = (bits >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xFFFu + odd) >> 13));
}

}  // namespace dipper
