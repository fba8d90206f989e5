// Sixteen lanes, of floats (F) or of 32 bits (I), the same on every instruction set. A translation unit an ISA defines
// DIPPER_ISA (the namespace), includes that ISA's simd_*.hpp, which has the lanes, and then kernels.inl. No standard
// templates here: their code would be shared across ISAs.
#pragma once

#include <cstdint>
#include <cstring>

namespace dipper::DIPPER_ISA {

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
