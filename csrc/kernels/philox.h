// Random numbers that are a pure function of a key and a counter, so that the backward pass recomputes the
// forward pass's numbers instead of storing them.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

namespace {

struct Random4 {
    UVec word[4];
};

/// Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for kLanes counters at
/// once. 7 rounds are the fewest with which it passes the BigCrush tests.
inline Random4 philox(UVec c0, UVec c1, UVec c2, UVec c3, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key);
    uint32_t k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 7; ++round) {
        UVec high0, low0, high1, low1;
        multiply_wide(c0, 0xD2511F53U, high0, low0);
        multiply_wide(c2, 0xCD9E8D57U, high1, low1);
        c0 = high1 ^ c1 ^ set_u(k0);
        c1 = low1;
        c2 = high0 ^ c3 ^ set_u(k1);
        c3 = low0;
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    return {{c0, c1, c2, c3}};
}

/// Turns random numbers into dropout factors: 0 with chance p, else 1 / (1 - p).
struct DropoutFactors {
    Vec limit, kept;
    explicit DropoutFactors(float p)
        : limit(set(p * 16777216.0F)), kept(set(1.0F / (1.0F - p))) {}  // compared with 24 random bits
    Vec operator()(UVec random) const { return zero_where(less(top_24_bits(random), limit), kept); }
};

}  // namespace
