// The AVX-512 kernels where the processor has VNNI too (Ice Lake, Zen 4 and later): quants_x86.h uses it.
#define MLXGPT_VNNI
#include "kernels/target_avx512.cpp"
