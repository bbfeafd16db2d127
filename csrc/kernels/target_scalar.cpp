// The kernels in plain C++, for any processor: the fallback, and what tests compare the other kernels with.
#include <math.h>
#include <string.h>

#include "kernels/table.h"

namespace {

using mlxgpt::BFloat16;
using mlxgpt::Float16;

constexpr int kLanes = 1;
constexpr int kTileRows = 4;  // a 4 x 4 block of sums: as many as most processors hold in registers
constexpr int kTileVecs = 4;

struct Vec {
    float x;
};
using Mask = bool;

inline Vec set(float x) { return {x}; }
inline Vec lane_numbers() { return {0.0F}; }
inline Vec load(const float* p) { return {*p}; }
inline void store(float* p, Vec a) { *p = a.x; }
inline Vec operator+(Vec a, Vec b) { return {a.x + b.x}; }
inline Vec operator-(Vec a, Vec b) { return {a.x - b.x}; }
inline Vec operator*(Vec a, Vec b) { return {a.x * b.x}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.x * b.x + c.x}; }
inline Vec max(Vec a, Vec b) { return {a.x > b.x ? a.x : b.x}; }
inline Vec min(Vec a, Vec b) { return {a.x < b.x ? a.x : b.x}; }
inline Vec operator/(Vec a, Vec b) { return {a.x / b.x}; }
inline Vec sqrt(Vec a) { return {sqrtf(a.x)}; }
inline Vec round(Vec a) { return {nearbyintf(a.x)}; }
inline Mask less(Vec a, Vec b) { return a.x < b.x; }
inline Vec select(Mask m, Vec yes, Vec no) { return m ? yes : no; }
inline Vec zero_where(Mask m, Vec a) { return m ? Vec{0.0F} : a; }
inline float sum(Vec a) { return a.x; }

inline Vec add_to_exponent(Vec a, Vec n) {
    uint32_t bits;
    memcpy(&bits, &a.x, 4);
    // NaN and values out of range may convert to any number, but the cast itself would be undefined
    // behaviour.
    const int32_t shift = n.x > -1e9F && n.x < 1e9F ? static_cast<int32_t>(n.x) : 0;
    bits += static_cast<uint32_t>(shift) << 23;
    memcpy(&a.x, &bits, 4);
    return a;
}

inline void transpose(Vec (&)[kLanes]) {}

inline Vec load(const BFloat16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    Vec a;
    memcpy(&a.x, &bits, 4);
    return a;
}
inline void store(BFloat16* p, Vec a) {
    uint32_t bits;
    memcpy(&bits, &a.x, 4);
    if (a.x != a.x)
        bits |= 0x400000;  // rounding could turn a NaN into an infinity
    else
        bits += 0x7FFF + (bits >> 16 & 1);
    p->bits = static_cast<uint16_t>(bits >> 16);
}
inline Vec load(const Float16* p) {
    uint32_t bits = static_cast<uint32_t>(p->bits & 0x7FFF) << 13;
    Vec a;
    memcpy(&a.x, &bits, 4);
    a.x *= 0x1p112F;  // the exponent's bias is 112 less; a product is right for subnormal numbers too
    memcpy(&bits, &a.x, 4);
    if ((p->bits & 0x7C00) == 0x7C00) bits |= 0x7F800000;
    bits |= static_cast<uint32_t>(p->bits & 0x8000) << 16;
    memcpy(&a.x, &bits, 4);
    return a;
}
inline void store(Float16* p, Vec a) {
    uint32_t bits;
    memcpy(&bits, &a.x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    uint32_t half;
    if (bits > 0x7F800000) {
        half = 0x7E00;
    } else if (bits >= 0x477FF000) {  // 65520 and up
        half = 0x7C00;
    } else if (bits < 0x38800000) {  // below 2^-14, subnormal as float16: adding 1/2 rounds to its last place
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5F;
        memcpy(&half, &shifted, 4);
        half -= 0x3F000000;
    } else {
        half = (bits - (112U << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | half);
}

struct UVec {
    uint32_t x;
};
inline UVec set_u(uint32_t x) { return {x}; }
inline UVec lane_numbers_u() { return {0}; }
inline UVec operator+(UVec a, UVec b) { return {a.x + b.x}; }
inline UVec operator-(UVec a, UVec b) { return {a.x - b.x}; }
inline UVec operator&(UVec a, UVec b) { return {a.x & b.x}; }
inline UVec operator^(UVec a, UVec b) { return {a.x ^ b.x}; }
inline void multiply_wide(UVec a, uint32_t m, UVec& high, UVec& low) {
    const uint64_t wide = static_cast<uint64_t>(a.x) * m;
    high = {static_cast<uint32_t>(wide >> 32)};
    low = {static_cast<uint32_t>(wide)};
}
inline Vec top_24_bits(UVec a) { return {static_cast<float>(a.x >> 8)}; }
inline UVec bits(Vec a) {
    UVec b;
    memcpy(&b.x, &a.x, 4);
    return b;
}
inline Vec from_bits(UVec a) {
    Vec b;
    memcpy(&b.x, &a.x, 4);
    return b;
}
inline UVec exponent_field(UVec a) { return {a.x >> 23}; }
inline Vec to_float(UVec a) { return {static_cast<float>(static_cast<int32_t>(a.x))}; }

// ---- products with quantized weights, 32 at a time ----

constexpr float kLargestQuant = 32767.0F;
template <int bits>
constexpr int kQuantCentre = 0;

struct Quants {
    int16_t x[32];
};
template <int bits>
inline Quants unpack(const unsigned char* p) {
    Quants q;
    for (int i = 0; i < 32; ++i) q.x[i] = bits == 8 ? p[i] : i < 16 ? p[i] & 15 : p[i - 16] >> 4;
    return q;
}
inline void store_quants(const int16_t* x, int16_t* out) { memcpy(out, x, 32 * sizeof *x); }
struct IntSums {
    int32_t x;
};
inline IntSums no_sums() { return {0}; }
inline const int16_t* load_quants(const int16_t* x) { return x; }
inline IntSums add_products(const Quants& q, const int16_t* x, IntSums sums) {
    for (int i = 0; i < 32; ++i) sums.x += q.x[i] * x[i];
    return sums;
}
using GroupSums = Vec;
inline GroupSums group_sums(Vec a) { return a; }
inline GroupSums fma(IntSums a, float b, GroupSums c) { return {static_cast<float>(a.x) * b + c.x}; }

}  // namespace

#include "kernels/fill_table.h"

namespace mlxgpt {
constexpr Kernels kernels_scalar = table_of("scalar");
}  // namespace mlxgpt
