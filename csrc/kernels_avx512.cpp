// AVX-512 F, BW, DQ, VL, VNNI: from Cascade Lake, Ice Lake and Zen 4 on.
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define DIPPER_ISA avx512
#define DIPPER_ISA_NAME "avx512"
#include "simd_avx512.hpp"
// after the lanes
#include "kernels.inl"
#endif
