// Reference: plain loops, the compiler's baseline instruction set.
#define DIPPER_ISA scalar
#define DIPPER_ISA_SCALAR
#define DIPPER_ISA_NAME "scalar"
#include "simd_scalar.hpp"
// after the lanes
#include "kernels.inl"
