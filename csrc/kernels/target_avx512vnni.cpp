// The AVX-512 kernels for processors with VNNI (Ice Lake, Zen 4 and later), which quants_x86.h uses.
#define MLXGPT_VNNI
#include "kernels/target_avx512.cpp"
