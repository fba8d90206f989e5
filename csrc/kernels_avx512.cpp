// AVX-512 F, BW, DQ, VL.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define DIPPER_ISA avx512
#define DIPPER_ISA_AVX512
#define DIPPER_ISA_NAME "avx512"
#include "kernels.inl"
#endif
