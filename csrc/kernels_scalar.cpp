// Reference: plain loops, the compiler's baseline instruction set.
#define DIPPER_ISA scalar
#define DIPPER_ISA_NAME "scalar"
#include "kernels.inl"
