// Dropout of activations, and the residual sum that follows it.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include "kernels/philox.h"
#include "kernels/vector_loops.h"

namespace {

/// Element i uses word (i % 64) / 16 of the random numbers of counter i / 64 * 16 + i % 16. So vectors of 4,
/// 8 or 16 adjacent counters give adjacent elements, and every instruction set gives the same mask.
void dropout(const float* x, const float* residual, uint64_t first, ptrdiff_t n, float p, uint64_t seed,
             float* out) {
    const DropoutFactors factors(p);
    x += first;
    out += first;
    if (residual != nullptr) residual += first;
    for (ptrdiff_t i0 = 0; i0 < n; i0 += 64) {
        const uint64_t block = (first + static_cast<uint64_t>(i0)) / 64;
        for (int lane = 0; lane < 16; lane += kLanes) {
            const UVec low =
                lane_numbers_u() + set_u(static_cast<uint32_t>(block * 16) + static_cast<uint32_t>(lane));
            const Random4 random =
                philox(low, set_u(static_cast<uint32_t>(block >> 28)), set_u(0), set_u(0), seed);
            for (int word = 0; word < 4; ++word) {
                const Vec mask = factors(random.word[word]);
                const ptrdiff_t i = i0 + word * 16 + lane;
                const auto element = [&](auto some) {
                    const Vec a = some.read(x + i) * mask;
                    some.write(out + i, residual == nullptr ? a : a + some.read(residual + i));
                };
                if (i + kLanes <= n)
                    element(Whole{});
                else if (i < n)
                    element(Part{static_cast<int>(n - i)});
            }
        }
    }
}

}  // namespace
