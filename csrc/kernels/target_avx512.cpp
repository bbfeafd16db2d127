// The kernels for x86-64 with AVX-512 F, BW, DQ and VL (Skylake server, Ice Lake, Zen 4 and later).
#include <immintrin.h>

#include "table.h"

namespace {

constexpr int kLanes = 16;
// Of 32 registers 8 x 2 sums, 2 vectors and a broadcast. 8 rows divide every usual head_dim, and 10
// loads for 16 FMAs stay under two loads a cycle, so a larger block would gain nothing.
constexpr int kTileRows = 8;
constexpr int kTileVecs = 2;

struct Vec {
    __m512 x;
};
using Mask = __mmask16;

inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec lane_numbers() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.x, yes.x)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.x); }

inline Vec add_to_exponent(Vec a, Vec n) {
    const __m512i shift = _mm512_slli_epi32(_mm512_cvtps_epi32(n.x), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.x), shift))};
}

struct UVec {
    __m512i x;
};
inline UVec set_u(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline UVec lane_numbers_u() {
    return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
inline UVec operator+(UVec a, UVec b) { return {_mm512_add_epi32(a.x, b.x)}; }
inline UVec operator^(UVec a, UVec b) { return {_mm512_xor_si512(a.x, b.x)}; }
inline void multiply_wide(UVec a, uint32_t m, UVec& high, UVec& low) {
    const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
    const __m512i even = _mm512_mul_epu32(a.x, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.x, 32), factor);
    low = {_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))};
    high = {_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd)};
}
inline Vec top_24_bits(UVec a) { return {_mm512_cvtepi32_ps(_mm512_srli_epi32(a.x, 8))}; }

// For vector mathematics and the operations beside attention.
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.x)}; }
inline UVec bits(Vec a) { return {_mm512_castps_si512(a.x)}; }
inline Vec from_bits(UVec a) { return {_mm512_castsi512_ps(a.x)}; }
inline UVec operator&(UVec a, UVec b) { return {_mm512_and_si512(a.x, b.x)}; }
inline UVec operator-(UVec a, UVec b) { return {_mm512_sub_epi32(a.x, b.x)}; }
inline UVec exponent_field(UVec a) { return {_mm512_srli_epi32(a.x, 23)}; }
inline Vec to_float(UVec a) { return {_mm512_cvtepi32_ps(a.x)}; }

}  // namespace

#include "attention.h"
#include "ops.h"

namespace mlxgpt {
const Kernels kernels_avx512 = MLXGPT_KERNEL_TABLE("avx512");
}
