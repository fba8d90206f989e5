// AVX2 + FMA + F16C.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DIPPER_ISA avx2
#define DIPPER_ISA_NAME "avx2"
#include "simd_avx2.hpp"
// after the lanes
#include "kernels.inl"
#endif
