// Faults and random weights, for both test programs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/table.h"

namespace mlxgpt {

inline int faults = 0;

/// Unless `good`, counts a fault and prints a line for it.
template <class... Values>
void expect(bool good, const char* format, Values... values) {
    if (good) return;
    if (++faults > 20) return;
    std::printf("FAULT: ");
    std::printf(format, values...);  // NOLINT
    std::printf("\n");
}

/// Random weights in any storage, and their exact values in double precision.
struct StoredWeights {
    std::vector<float> floats;
    std::vector<uint16_t> halves, scales, biases;
    std::vector<uint32_t> words;
    Weights view;
    std::vector<double> exact;

    /// If bits is 0, floats in `storage`; else quantized, with scales and biases in `storage`, which is not
    /// float32. Rows have gaps.
    StoredWeights(int n_out, int n_in, Storage storage, int bits = 0, int group = 0)
        : exact(static_cast<size_t>(n_out) * n_in) {
        std::mt19937 random(n_out * 1000 + n_in);
        std::normal_distribution<float> normal;
        view.storage = storage;
        view.bits = bits;
        view.group = group;
        view.stride = bits == 0 ? n_in + 3 : n_in / 32 * bits + 3;
        const size_t size = n_out * view.stride;
        if (bits != 0) {
            view.scale_stride = n_in / group;
            for (uint32_t& word : words = std::vector<uint32_t>(size)) word = static_cast<uint32_t>(random());
            for (std::vector<uint16_t>* factors : {&scales, &biases}) {
                factors->resize(n_out * view.scale_stride);
                for (uint16_t& x : *factors) x = half(normal(random) / static_cast<float>(1 << bits));
            }
            view.data = words.data();
            view.scales = scales.data();
            view.biases = biases.data();
        } else if (storage == Storage::kFloat32) {
            for (float& x : floats = std::vector<float>(size)) x = normal(random);
            view.data = floats.data();
        } else {
            for (uint16_t& x : halves = std::vector<uint16_t>(size)) x = half(normal(random));
            view.data = halves.data();
        }
        for (int i = 0; i < n_out; ++i)
            for (int j = 0; j < n_in; ++j) exact[static_cast<size_t>(i) * n_in + j] = at(i, j);
    }

  private:
    // x rounded towards zero and clamped, so that it is neither infinite nor subnormal.
    uint16_t half(float x) const {
        x = std::copysign(std::fmin(std::fabs(x) + 0.001F, 4.0F), x);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (view.storage == Storage::kBFloat16) return static_cast<uint16_t>(bits >> 16);
        return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits & 0x7FFFFFFF) - (112U << 23)) >> 13);
    }
    double value(uint16_t stored) const {
        uint32_t bits = static_cast<uint32_t>(stored) << 16;
        const bool is_half = view.storage == Storage::kFloat16;
        if (is_half) bits = (bits & 0x80000000) | (bits & 0x7FFF0000) >> 3;
        float x;
        std::memcpy(&x, &bits, 4);
        return is_half ? x * 0x1p112 : x;
    }
    double at(int i, int j) const {
        if (!floats.empty()) return floats[i * view.stride + j];
        if (!halves.empty()) return value(halves[i * view.stride + j]);
        const int bit = j * view.bits;
        const uint32_t q = words[i * view.stride + bit / 32] >> bit % 32 & ((1U << view.bits) - 1);
        const ptrdiff_t g = i * view.scale_stride + j / view.group;
        return value(scales[g]) * q + value(biases[g]);
    }
};

/// Calls f(storage, bits, group) for every way to store weights of n_in columns.
template <class F>
void for_storages(int n_in, F f) {
    for (const Storage storage : {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16}) f(storage, 0, 0);
    for (const Storage storage : {Storage::kBFloat16, Storage::kFloat16})
        for (const int bits : {4, 8})
            for (const int group : {32, 64, 128})
                if (n_in % group == 0) f(storage, bits, group);
}

/// A test program's exit status.
inline int verdict() {
    std::printf(faults == 0 ? "passed\n" : "%d faults\n", faults);
    return faults == 0 ? 0 : 1;
}

}  // namespace mlxgpt
