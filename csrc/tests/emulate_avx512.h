// AVX-512 by SIMDe, to test the AVX-512 kernels on a processor without it. Intrinsics that Debian's version
// of SIMDe lacks are emulated here, on two halves. The CMake option MLXGPT_EMULATE_AVX512 includes this
// before target_avx512.cpp.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <string.h>

namespace emulate_avx512 {

// Applies f to each half of a; the results are the halves of To.
template <class To, class HalfFrom, class From, class F>
inline To halves(From a, F f) {
    HalfFrom in[2];
    memcpy(in, &a, sizeof in);
    const decltype(f(in[0])) out[2] = {f(in[0]), f(in[1])};
    To result;
    static_assert(sizeof result == sizeof out, "two halves make the whole");
    memcpy(&result, out, sizeof out);
    return result;
}
inline __m512i cvtps_epi32(__m512 a) {
    return halves<__m512i, __m256>(a, [](__m256 x) { return _mm256_cvtps_epi32(x); });
}
inline __m512 cvtepi32_ps(__m512i a) {
    return halves<__m512, __m256i>(a, [](__m256i x) { return _mm256_cvtepi32_ps(x); });
}
template <int n>
inline __m512i srai_epi32(__m512i a) {
    return halves<__m512i, __m256i>(a, [](__m256i x) { return _mm256_srai_epi32(x, n); });
}
inline __m512i cvtepu16_epi32(__m256i a) {
    return halves<__m512i, __m128i>(a, [](__m128i x) { return _mm256_cvtepu16_epi32(x); });
}
inline __m512 cvtph_ps(__m256i a) {
    return halves<__m512, __m128i>(a, [](__m128i x) { return _mm256_cvtph_ps(x); });
}
template <int mode>
inline __m256i cvtps_ph(__m512 a) {
    return halves<__m256i, __m256>(a, [](__m256 x) { return _mm256_cvtps_ph(x, mode); });
}
inline __m256i cvtepi32_epi16(__m512i a) {
    int in[16];
    short out[16];
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; ++i) out[i] = static_cast<short>(in[i]);
    __m256i result;
    memcpy(&result, out, sizeof out);
    return result;
}
inline __m512 shuffle_f32x4(__m512 a, __m512 b, int quarters) {
    float from[32], to[16];
    memcpy(from, &a, sizeof a);
    memcpy(from + 16, &b, sizeof b);
    for (int i = 0; i < 16; ++i) to[i] = from[16 * (i / 8) + 4 * (quarters >> (2 * (i / 4)) & 3) + i % 4];
    __m512 result;
    memcpy(&result, to, sizeof to);
    return result;
}

}  // namespace emulate_avx512

#define _mm512_cvtps_epi32 emulate_avx512::cvtps_epi32
#define _mm512_cvtepi32_ps emulate_avx512::cvtepi32_ps
#define _mm512_srai_epi32(a, n) emulate_avx512::srai_epi32<n>(a)
#define _mm512_cvtepu16_epi32 emulate_avx512::cvtepu16_epi32
#define _mm512_cvtph_ps emulate_avx512::cvtph_ps
#define _mm512_cvtps_ph(a, mode) emulate_avx512::cvtps_ph<mode>(a)
#define _mm512_cvtepi32_epi16 emulate_avx512::cvtepi32_epi16
#define _mm512_shuffle_f32x4 emulate_avx512::shuffle_f32x4
#define _mm256_dpwssd_epi32(sums, a, b) _mm256_add_epi32(sums, _mm256_madd_epi16(a, b))
