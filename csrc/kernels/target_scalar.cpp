// The kernels in plain C++, for any processor: the fallback, and the second opinion on the others.
#include <math.h>
#include <string.h>

#include "table.h"

namespace {

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
inline Vec round(Vec a) { return {nearbyintf(a.x)}; }
inline Mask less(Vec a, Vec b) { return a.x < b.x; }
inline Vec select(Mask m, Vec yes, Vec no) { return m ? yes : no; }
inline float sum(Vec a) { return a.x; }

inline Vec add_to_exponent(Vec a, Vec n) {
    uint32_t bits;
    memcpy(&bits, &a.x, 4);
    // A NaN or a value out of range converts to anything, as the vector instructions have it; the
    // cast itself would be undefined.
    const int32_t shift = n.x > -1e9F && n.x < 1e9F ? static_cast<int32_t>(n.x) : 0;
    bits += static_cast<uint32_t>(shift) << 23;
    memcpy(&a.x, &bits, 4);
    return a;
}

struct UVec {
    uint32_t x;
};
inline UVec set_u(uint32_t x) { return {x}; }
inline UVec lane_numbers_u() { return {0}; }
inline UVec operator+(UVec a, UVec b) { return {a.x + b.x}; }
inline UVec operator^(UVec a, UVec b) { return {a.x ^ b.x}; }
inline void multiply_wide(UVec a, uint32_t m, UVec& high, UVec& low) {
    const uint64_t wide = static_cast<uint64_t>(a.x) * m;
    high = {static_cast<uint32_t>(wide >> 32)};
    low = {static_cast<uint32_t>(wide)};
}
inline Vec top_24_bits(UVec a) { return {static_cast<float>(a.x >> 8)}; }

// For vector mathematics and the operations beside attention.
inline Vec operator/(Vec a, Vec b) { return {a.x / b.x}; }
inline Vec sqrt(Vec a) { return {sqrtf(a.x)}; }
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
inline UVec operator&(UVec a, UVec b) { return {a.x & b.x}; }
inline UVec operator-(UVec a, UVec b) { return {a.x - b.x}; }
inline UVec exponent_field(UVec a) { return {a.x >> 23}; }
inline Vec to_float(UVec a) { return {static_cast<float>(static_cast<int32_t>(a.x))}; }

}  // namespace

#include "attention.h"
#include "ops.h"

namespace mlxgpt {
const Kernels kernels_scalar = MLXGPT_KERNEL_TABLE("scalar");
}
