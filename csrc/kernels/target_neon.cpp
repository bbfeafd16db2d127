// The kernels for 64-bit Arm. Every such processor has NEON.
#include <arm_neon.h>
#include <string.h>

#include "kernels/table.h"

namespace {

using mlxgpt::BFloat16;
using mlxgpt::Float16;

constexpr int kLanes = 4;
// 6 x 4 sums, 4 vectors and a broadcast, of 32 registers. Apple's cores start 4 multiply-adds a cycle with a
// latency of 4, so at least 16 sums are needed; 10 loads for 24 multiply-adds are fewer than two a cycle.
constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;

struct Vec {
    float32x4_t x;
};
struct Mask {
    uint32x4_t x;
};

inline Vec set(float x) { return {vdupq_n_f32(x)}; }
inline Vec lane_numbers() {
    const float numbers[4] = {0, 1, 2, 3};
    return {vld1q_f32(numbers)};
}
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, Vec a) { vst1q_f32(p, a.x); }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.x, b.x)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.x, b.x)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.x, a.x, b.x)}; }
inline Vec max(Vec a, Vec b) { return {vmaxq_f32(a.x, b.x)}; }
inline Vec min(Vec a, Vec b) { return {vminq_f32(a.x, b.x)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.x, b.x)}; }
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.x)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.x)}; }
inline Mask less(Vec a, Vec b) { return {vcltq_f32(a.x, b.x)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {vbslq_f32(m.x, yes.x, no.x)}; }
inline Vec zero_where(Mask m, Vec a) {
    return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.x), m.x))};
}
inline float sum(Vec a) { return vaddvq_f32(a.x); }

inline Vec add_to_exponent(Vec a, Vec n) {
    const int32x4_t shift = vshlq_n_s32(vcvtq_s32_f32(n.x), 23);
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.x), shift))};
}

/// Transposes 4 rows of 4: x[c] becomes the c-th element of each.
inline void transpose(Vec (&x)[kLanes]) {
    const float32x4_t a = vzip1q_f32(x[0].x, x[2].x);  // elements 0, 1 of rows 0 and 2
    const float32x4_t b = vzip2q_f32(x[0].x, x[2].x);
    const float32x4_t c = vzip1q_f32(x[1].x, x[3].x);
    const float32x4_t d = vzip2q_f32(x[1].x, x[3].x);
    x[0].x = vzip1q_f32(a, c);
    x[1].x = vzip2q_f32(a, c);
    x[2].x = vzip1q_f32(b, d);
    x[3].x = vzip2q_f32(b, d);
}

inline Vec load(const BFloat16* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))}; }
inline void store(BFloat16* p, Vec a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t even = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    // Rounding could turn a NaN into an infinity.
    const uint32x4_t nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(a.x, a.x), even, nan), 16));
}
inline Vec load(const Float16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))}; }
inline void store(Float16* p, Vec a) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a.x))); }

struct UVec {
    uint32x4_t x;
};
inline UVec set_u(uint32_t x) { return {vdupq_n_u32(x)}; }
inline UVec lane_numbers_u() {
    const uint32_t numbers[4] = {0, 1, 2, 3};
    return {vld1q_u32(numbers)};
}
inline UVec operator+(UVec a, UVec b) { return {vaddq_u32(a.x, b.x)}; }
inline UVec operator-(UVec a, UVec b) { return {vsubq_u32(a.x, b.x)}; }
inline UVec operator&(UVec a, UVec b) { return {vandq_u32(a.x, b.x)}; }
inline UVec operator^(UVec a, UVec b) { return {veorq_u32(a.x, b.x)}; }
inline void multiply_wide(UVec a, uint32_t m, UVec& high, UVec& low) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a.x), m));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(a.x), m));
    low = {vuzp1q_u32(first, second)};
    high = {vuzp2q_u32(first, second)};
}
inline Vec top_24_bits(UVec a) { return {vcvtq_f32_u32(vshrq_n_u32(a.x, 8))}; }
inline UVec bits(Vec a) { return {vreinterpretq_u32_f32(a.x)}; }
inline Vec from_bits(UVec a) { return {vreinterpretq_f32_u32(a.x)}; }
inline UVec exponent_field(UVec a) { return {vshrq_n_u32(a.x, 23)}; }
inline Vec to_float(UVec a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.x))}; }

// ---- products with quantized weights, 32 at a time ----

#if defined(MLXGPT_DOT)
// sdot multiplies int8: x is split into 256 high + low, each from -128 to 127, and 128 is subtracted from
// weights of 8 bits, which their biases correct for.
constexpr float kLargestQuant = 127 * 256 + 127;
template <int bits>
constexpr int kQuantCentre = bits == 8 ? 128 : 0;
#else
constexpr float kLargestQuant = 32767.0F;
template <int bits>
constexpr int kQuantCentre = 0;
#endif

/// The bytes of 32 weights, in the order of few_rows.h.
struct Quants {
    uint8x16_t x[2];
};
template <int bits>
inline Quants unpack(const unsigned char* p) {
    const uint8x16_t first = vld1q_u8(p);
    if constexpr (bits == 4) return {{vandq_u8(first, vdupq_n_u8(15)), vshrq_n_u8(first, 4)}};
    const uint8x16_t less_centre = vdupq_n_u8(kQuantCentre<bits>);  // q ^ 128 is q - 128 as int8
    return {{veorq_u8(first, less_centre), veorq_u8(vld1q_u8(p + 16), less_centre)}};
}

#if defined(MLXGPT_DOT)

inline void store_quants(const int16_t* x, int16_t* out) {
    auto* bytes = reinterpret_cast<int8_t*>(out);
    for (int i = 0; i < 32; ++i) {
        bytes[i] = static_cast<int8_t>((x[i] + 128) >> 8);
        bytes[32 + i] = static_cast<int8_t>((x[i] + 128) % 256 - 128);
    }
}
struct IntSums {
    int32x4_t high, low;
};
inline IntSums no_sums() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline int8x16x4_t load_quants(const int16_t* x) { return vld1q_s8_x4(reinterpret_cast<const int8_t*>(x)); }
inline IntSums add_products(const Quants& q, const int8x16x4_t& x, IntSums sums) {
    for (int i = 0; i < 2; ++i) {
        const int8x16_t weights = vreinterpretq_s8_u8(q.x[i]);
        sums.high = vdotq_s32(sums.high, weights, x.val[i]);
        sums.low = vdotq_s32(sums.low, weights, x.val[2 + i]);
    }
    return sums;
}
inline int32x4_t total(IntSums a) { return vaddq_s32(vshlq_n_s32(a.high, 8), a.low); }

#else

inline void store_quants(const int16_t* x, int16_t* out) { memcpy(out, x, 32 * sizeof *x); }
struct IntSums {
    int32x4_t x;
};
inline IntSums no_sums() { return {vdupq_n_s32(0)}; }
inline int16x8x4_t load_quants(const int16_t* x) { return vld1q_s16_x4(x); }
inline IntSums add_products(const Quants& q, const int16x8x4_t& x, IntSums sums) {
    for (int i = 0; i < 2; ++i) {
        const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(q.x[i])));
        const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(q.x[i]));
        const int16x8_t first = x.val[2 * i], second = x.val[2 * i + 1];
        sums.x = vmlal_s16(sums.x, vget_low_s16(low), vget_low_s16(first));
        sums.x = vmlal_high_s16(sums.x, low, first);
        sums.x = vmlal_s16(sums.x, vget_low_s16(high), vget_low_s16(second));
        sums.x = vmlal_high_s16(sums.x, high, second);
    }
    return sums;
}
inline int32x4_t total(IntSums a) { return a.x; }

#endif

using GroupSums = Vec;
inline GroupSums group_sums(Vec a) { return a; }
inline GroupSums fma(IntSums a, float b, GroupSums c) {
    return {vfmaq_n_f32(c.x, vcvtq_f32_s32(total(a)), b)};
}

}  // namespace

#include "kernels/fill_table.h"

namespace mlxgpt {
#if defined(MLXGPT_DOT)
constexpr Kernels kernels_neondot = table_of("neondot");
#else
constexpr Kernels kernels_neon = table_of("neon");
#endif
}  // namespace mlxgpt
