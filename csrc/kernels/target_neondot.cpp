// The NEON kernels for processors with dot products of int8 (Armv8.2, all of Apple's), used for products with
// quantized weights.
#define MLXGPT_DOT
#include "kernels/target_neon.cpp"
