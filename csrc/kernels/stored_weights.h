// Weights in any storage, floats or quantized, converted to float32.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include "kernels/table.h"
#include "kernels/vector_loops.h"

namespace {

using mlxgpt::BFloat16;
using mlxgpt::Float16;
using mlxgpt::Storage;
using mlxgpt::Weights;

/// Calls f with a pointer of the type that the floats are stored in.
template <class F>
inline void typed(const void* data, Storage storage, F f) {
    if (storage == Storage::kBFloat16)
        f(static_cast<const BFloat16*>(data));
    else if (storage == Storage::kFloat16)
        f(static_cast<const Float16*>(data));
    else
        f(static_cast<const float*>(data));
}

inline void to_floats(const void* data, Storage storage, ptrdiff_t n, float* out) {
    typed(data, storage, [=](const auto* x) {
        for_vectors(n, [&](ptrdiff_t i, auto some) { some.write(out + i, some.read(x + i)); });
    });
}

void weight_row(const Weights& weights, int n_in, float* out) {
    if (weights.bits == 0) return to_floats(weights.data, weights.storage, n_in, out);
    const auto* q = static_cast<const unsigned char*>(weights.data);
    const char* scales = static_cast<const char*>(weights.scales);
    const char* biases = static_cast<const char*>(weights.biases);
    for (int i = 0; i < n_in; i += weights.group) {
        float scale, bias;
        to_floats(scales + i / weights.group * weights.element_size(), weights.storage, 1, &scale);
        to_floats(biases + i / weights.group * weights.element_size(), weights.storage, 1, &bias);
        // Two loops that compilers vectorize: first bytes, then floats.
        unsigned char bytes[128];
        const unsigned char* numbers = q + i;
        if (weights.bits == 4) {
            for (int j = 0; j < weights.group / 2; ++j) {
                bytes[2 * j] = q[i / 2 + j] & 15;
                bytes[2 * j + 1] = q[i / 2 + j] >> 4;
            }
            numbers = bytes;
        }
        for (int j = 0; j < weights.group; ++j) out[i + j] = scale * static_cast<float>(numbers[j]) + bias;
    }
}

}  // namespace
