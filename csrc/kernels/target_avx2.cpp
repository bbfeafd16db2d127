// The kernels for x86-64 with AVX2 and FMA.
#include <immintrin.h>

#include "kernels/quants_x86.h"
#include "kernels/table.h"

namespace {

using mlxgpt::BFloat16;
using mlxgpt::Float16;

constexpr int kLanes = 8;
// 16 registers hold 6 x 2 sums, 2 vectors and a broadcast. 12 sums hide the latency of a multiply-add (4
// cycles, 2 started a cycle: at least 8 are needed), and 8 loads for 12 multiply-adds are fewer than two
// loads a cycle.
constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;

struct Vec {
    __m256 x;
};
struct Mask {
    __m256 x;
};

inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec lane_numbers() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.x); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.x, b.x)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.x)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.x, yes.x, m.x)}; }
inline Vec zero_where(Mask m, Vec a) { return {_mm256_andnot_ps(m.x, a.x)}; }

inline float sum(Vec a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline Vec add_to_exponent(Vec a, Vec n) {
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n.x), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.x), shift))};
}

/// Transposes 8 rows of 8: x[c] becomes the c-th element of each.
inline void transpose(Vec (&x)[kLanes]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {  // pairs of rows, interleaved
        t[i] = _mm256_unpacklo_ps(x[i].x, x[i + 1].x);
        t[i + 1] = _mm256_unpackhi_ps(x[i].x, x[i + 1].x);
    }
    for (int i = 0; i < 8; i += 4) {  // fours of rows
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        x[i].x = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        x[i + 4].x = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

inline Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline void store(BFloat16* p, Vec a) {
    const __m256i bits = _mm256_castps_si256(a.x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    // Rounding could turn a NaN into an infinity.
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(even, nan, is_nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(Float16* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}

struct UVec {
    __m256i x;
};
inline UVec set_u(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
inline UVec lane_numbers_u() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
inline UVec operator+(UVec a, UVec b) { return {_mm256_add_epi32(a.x, b.x)}; }
inline UVec operator-(UVec a, UVec b) { return {_mm256_sub_epi32(a.x, b.x)}; }
inline UVec operator&(UVec a, UVec b) { return {_mm256_and_si256(a.x, b.x)}; }
inline UVec operator^(UVec a, UVec b) { return {_mm256_xor_si256(a.x, b.x)}; }
inline void multiply_wide(UVec a, uint32_t m, UVec& high, UVec& low) {
    const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
    const __m256i even = _mm256_mul_epu32(a.x, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.x, 32), factor);
    low = {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA)};
    high = {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA)};
}
inline Vec top_24_bits(UVec a) { return {_mm256_cvtepi32_ps(_mm256_srli_epi32(a.x, 8))}; }
inline UVec bits(Vec a) { return {_mm256_castps_si256(a.x)}; }
inline Vec from_bits(UVec a) { return {_mm256_castsi256_ps(a.x)}; }
inline UVec exponent_field(UVec a) { return {_mm256_srli_epi32(a.x, 23)}; }
inline Vec to_float(UVec a) { return {_mm256_cvtepi32_ps(a.x)}; }

inline GroupSums group_sums(Vec a) { return {a.x}; }

}  // namespace

#include "kernels/fill_table.h"

namespace mlxgpt {
constexpr Kernels kernels_avx2 = table_of("avx2");
}  // namespace mlxgpt
