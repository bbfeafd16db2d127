// The NEON kernels where the processor has dot products of int8 too (Armv8.2, all of Apple's): for products
// with quantized weights.
#define MLXGPT_DOT
#include "kernels/target_neon.cpp"
