// The kernels for 64-bit Arm, whose every processor has NEON.
#include <arm_neon.h>

#include "table.h"

namespace {

constexpr int kLanes = 4;
// Of 32 registers 6 x 4 sums, 4 vectors and a broadcast. Apple's cores start 4 FMAs a cycle with a
// latency of 4, so 16 sums are the least; 10 loads for 24 FMAs stay under two a cycle.
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
inline Vec round(Vec a) { return {vrndnq_f32(a.x)}; }
inline Mask less(Vec a, Vec b) { return {vcltq_f32(a.x, b.x)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {vbslq_f32(m.x, yes.x, no.x)}; }
inline float sum(Vec a) { return vaddvq_f32(a.x); }

inline Vec add_to_exponent(Vec a, Vec n) {
    const int32x4_t shift = vshlq_n_s32(vcvtq_s32_f32(n.x), 23);
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.x), shift))};
}

struct UVec {
    uint32x4_t x;
};
inline UVec set_u(uint32_t x) { return {vdupq_n_u32(x)}; }
inline UVec lane_numbers_u() {
    const uint32_t numbers[4] = {0, 1, 2, 3};
    return {vld1q_u32(numbers)};
}
inline UVec operator+(UVec a, UVec b) { return {vaddq_u32(a.x, b.x)}; }
inline UVec operator^(UVec a, UVec b) { return {veorq_u32(a.x, b.x)}; }
inline void multiply_wide(UVec a, uint32_t m, UVec& high, UVec& low) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a.x), m));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(a.x), m));
    low = {vuzp1q_u32(first, second)};
    high = {vuzp2q_u32(first, second)};
}
inline Vec top_24_bits(UVec a) { return {vcvtq_f32_u32(vshrq_n_u32(a.x, 8))}; }

// For vector mathematics and the operations beside attention.
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.x, b.x)}; }
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.x)}; }
inline UVec bits(Vec a) { return {vreinterpretq_u32_f32(a.x)}; }
inline Vec from_bits(UVec a) { return {vreinterpretq_f32_u32(a.x)}; }
inline UVec operator&(UVec a, UVec b) { return {vandq_u32(a.x, b.x)}; }
inline UVec operator-(UVec a, UVec b) { return {vsubq_u32(a.x, b.x)}; }
inline UVec exponent_field(UVec a) { return {vshrq_n_u32(a.x, 23)}; }
inline Vec to_float(UVec a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.x))}; }

}  // namespace

#include "attention.h"
#include "ops.h"

namespace mlxgpt {
const Kernels kernels_neon = MLXGPT_KERNEL_TABLE("neon");
}
