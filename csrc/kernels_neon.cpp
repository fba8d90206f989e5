// NEON: every AArch64 CPU has it.
#if defined(__aarch64__)
#define DIPPER_ISA neon
#define DIPPER_ISA_NAME "neon"
#include "simd_neon.hpp"
// after the lanes
#include "kernels.inl"
#endif
