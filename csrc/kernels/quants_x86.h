// Products with quantized weights on x86-64: pmaddwd multiplies int16 and adds pairs, VNNI's vpdpwssd also
// adds the pairs to the sums. Vectors of 256 bits are enough to keep up with memory.
//
// Included by target_avx2.cpp and target_avx512.cpp.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr float kLargestQuant = 32767.0F;
template <int bits>
constexpr int kQuantCentre = 0;

/// 32 weights as int16, in the order of few_rows.h.
struct Quants {
    __m256i x[2];
};
template <int bits>
inline Quants unpack(const unsigned char* p) {
    const auto* at = reinterpret_cast<const __m128i*>(p);
    const __m256i first = _mm256_cvtepu8_epi16(_mm_loadu_si128(at));
    if constexpr (bits == 8) return {{first, _mm256_cvtepu8_epi16(_mm_loadu_si128(at + 1))}};
    return {{_mm256_and_si256(first, _mm256_set1_epi16(15)), _mm256_srli_epi16(first, 4)}};
}

inline void store_quants(const int16_t* x, int16_t* out) { memcpy(out, x, 32 * sizeof *x); }

struct IntSums {
    __m256i x;
};
inline IntSums no_sums() { return {_mm256_setzero_si256()}; }
inline Quants load_quants(const int16_t* x) {
    const auto* at = reinterpret_cast<const __m256i*>(x);
    return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
inline IntSums add_products(const Quants& q, const Quants& x, IntSums sums) {
    for (int i = 0; i < 2; ++i)
#if defined(MLXGPT_VNNI)
        sums.x = _mm256_dpwssd_epi32(sums.x, q.x[i], x.x[i]);
#else
        sums.x = _mm256_add_epi32(sums.x, _mm256_madd_epi16(q.x[i], x.x[i]));
#endif
    return sums;
}

struct GroupSums {
    __m256 x;
};
inline GroupSums fma(IntSums a, float b, GroupSums c) {
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(a.x), _mm256_set1_ps(b), c.x)};
}
inline float sum(GroupSums a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
