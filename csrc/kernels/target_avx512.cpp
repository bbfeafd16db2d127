// The kernels for x86-64 with AVX-512 F, BW, DQ and VL (Skylake server, Ice Lake, Zen 4 and later).
#include <immintrin.h>

#include "kernels/quants_x86.h"
#include "kernels/table.h"

namespace {

using mlxgpt::BFloat16;
using mlxgpt::Float16;

constexpr int kLanes = 16;
// 8 x 2 sums, 2 vectors and a broadcast, of 32 registers. 8 rows divide every usual head_dim, and 10 loads
// for 16 multiply-adds are fewer than two loads a cycle, so that a larger block would gain nothing.
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
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.x)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.x, yes.x)}; }
inline Vec zero_where(Mask m, Vec a) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(~m), a.x)}; }
inline float sum(Vec a) {
    const __m512 high = _mm512_shuffle_f32x4(a.x, a.x, 0xEE);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.x), _mm512_castps512_ps256(high));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline Vec add_to_exponent(Vec a, Vec n) {
    const __m512i shift = _mm512_slli_epi32(_mm512_cvtps_epi32(n.x), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.x), shift))};
}

/// Transposes 16 rows of 16: x[c] becomes the c-th element of each.
inline void transpose(Vec (&x)[kLanes]) {
    __m512 t[16], u[16];
    for (int i = 0; i < 16; i += 2) {  // pairs of rows, interleaved
        t[i] = _mm512_unpacklo_ps(x[i].x, x[i + 1].x);
        t[i + 1] = _mm512_unpackhi_ps(x[i].x, x[i + 1].x);
    }
    for (int i = 0; i < 16; i += 4) {  // fours of rows: u[i + c] has column c of each quarter
        u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int c = 0; c < 4; ++c) {  // a 4 x 4 transpose of quarters
        const __m512 even_low = _mm512_shuffle_f32x4(u[c], u[c + 4], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(u[c], u[c + 4], 0xDD);
        const __m512 even_high = _mm512_shuffle_f32x4(u[c + 8], u[c + 12], 0x88);
        const __m512 odd_high = _mm512_shuffle_f32x4(u[c + 8], u[c + 12], 0xDD);
        x[c].x = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        x[c + 4].x = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        x[c + 8].x = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
        x[c + 12].x = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
    }
}

inline Vec load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline void store(BFloat16* p, Vec a) {
    const __m512i bits = _mm512_castps_si512(a.x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    // Rounding could turn a NaN into an infinity.
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, even, nan), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
inline Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(Float16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}

struct UVec {
    __m512i x;
};
inline UVec set_u(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline UVec lane_numbers_u() {
    return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
inline UVec operator+(UVec a, UVec b) { return {_mm512_add_epi32(a.x, b.x)}; }
inline UVec operator-(UVec a, UVec b) { return {_mm512_sub_epi32(a.x, b.x)}; }
inline UVec operator&(UVec a, UVec b) { return {_mm512_and_si512(a.x, b.x)}; }
inline UVec operator^(UVec a, UVec b) { return {_mm512_xor_si512(a.x, b.x)}; }
inline void multiply_wide(UVec a, uint32_t m, UVec& high, UVec& low) {
    const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
    const __m512i even = _mm512_mul_epu32(a.x, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.x, 32), factor);
    low = {_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))};
    high = {_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd)};
}
inline Vec top_24_bits(UVec a) { return {_mm512_cvtepi32_ps(_mm512_srli_epi32(a.x, 8))}; }
inline UVec bits(Vec a) { return {_mm512_castps_si512(a.x)}; }
inline Vec from_bits(UVec a) { return {_mm512_castsi512_ps(a.x)}; }
inline UVec exponent_field(UVec a) { return {_mm512_srli_epi32(a.x, 23)}; }
inline Vec to_float(UVec a) { return {_mm512_cvtepi32_ps(a.x)}; }

inline GroupSums group_sums(Vec a) {
    const __m512 high = _mm512_shuffle_f32x4(a.x, a.x, 0xEE);
    return {_mm256_add_ps(_mm512_castps512_ps256(a.x), _mm512_castps512_ps256(high))};
}

}  // namespace

#include "kernels/fill_table.h"

namespace mlxgpt {
#if defined(MLXGPT_VNNI)
constexpr Kernels kernels_avx512vnni = table_of("avx512vnni");
#else
constexpr Kernels kernels_avx512 = table_of("avx512");
#endif
}  // namespace mlxgpt
