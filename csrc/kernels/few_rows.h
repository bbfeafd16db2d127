// The product of a few rows with a matrix of weights in any storage, as in decoding: each weight is used once
// or a few times, so that the time is that of reading it from memory, and no BLAS is of help.
//
// Weights are read from memory once: some rows of them stay in L1 while all rows of x pass by. Every sum has
// one accumulator, which takes its terms in order: a row of x gives the same bits alone and among others.
//
// With quantized weights, x is quantized too, to 16 bits for each group of the weights, so that a group's
// sum of q x is exact in 32-bit integers (128 * 255 * 32767 < 2^31) and no weight is converted. The result
// is off by 1e-5 of the sum's size or so: a rounding is 1 / 65534 of the largest x of its group.
//
// Included by target_<isa>.cpp behind that file's Vec and Quants.
#pragma once

#include <math.h>
#include <string.h>

#include "vectors.h"

namespace {

using mlxgpt::BFloat16;
using mlxgpt::Float16;
using mlxgpt::Rows;
using mlxgpt::Storage;
using mlxgpt::Weights;

/// Calls f with a pointer of the type that floats are stored in.
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
        if (weights.bits == 8) {
            for (int j = 0; j < weights.group; ++j) out[i + j] = scale * static_cast<float>(q[i + j]) + bias;
        } else {
            for (int j = 0; j < weights.group; j += 2) {
                const int pair = q[(i + j) / 2];
                out[i + j] = scale * static_cast<float>(pair & 15) + bias;
                out[i + j + 1] = scale * static_cast<float>(pair >> 4) + bias;
            }
        }
    }
}

// ---- floats ----

// W weights of a column times R rows of x: as many sums as a register block of tile.h has.
constexpr int kWeightRows = 4;
constexpr int kMostRows = kTileRows * kTileVecs / kWeightRows;

template <int W, int R, class T>
inline void dots(const T* weights, ptrdiff_t stride, int n_in, Rows x, Rows out) {
    Vec sums[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) sums[r][w] = set(0.0F);
    for_vectors(n_in, [&](ptrdiff_t i, auto some) {
        Vec column[R];
        for (int r = 0; r < R; ++r) column[r] = some.read(x.data + r * x.stride + i);
        for (int w = 0; w < W; ++w) {
            const Vec weight = some.read(weights + w * stride + i);
            for (int r = 0; r < R; ++r) sums[r][w] = fma(weight, column[r], sums[r][w]);
        }
    });
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) out.data[r * out.stride + w] = sum(sums[r][w]);
}

template <int n>
struct Constant {
    static constexpr int value = n;
};

/// Calls f with a constant number of rows, R where as many are left, and the first of them, for all n.
template <int R, class F>
inline void blocks_of_rows(int n, F f, int first = 0) {
    if constexpr (R > 0) {
        for (; n - first >= R; first += R) f(Constant<R>{}, first);
        blocks_of_rows<R - 1>(n, f, first);
    }
}

template <class T>
inline void float_products(Rows x, int n_rows, const T* weights, ptrdiff_t stride, int n_out, int n_in,
                           Rows out) {
    int w = 0;
    const auto some_weights = [&](auto W) {
        blocks_of_rows<kMostRows>(n_rows, [&](auto R, int first) {
            dots<W.value, R.value>(weights + w * stride, stride, n_in,
                                   Rows{x.data + first * x.stride, x.stride},
                                   Rows{out.data + first * out.stride + w, out.stride});
        });
        w += W.value;
    };
    while (w + kWeightRows <= n_out) some_weights(Constant<kWeightRows>{});
    while (w < n_out) some_weights(Constant<1>{});
}

// ---- quantized ----

// A quantized row of x: n_in int16; for each group the step dx between them; for each group the sum of the
// floats. The latter two are filled up with zeros to whole vectors. The int16 go by units of 32: with 8 bits
// in order, with 4 bits first those that meet the low halves of 16 bytes, then the others.
constexpr int kUnit = 32;
constexpr int kMostQuantizedRows = 4;
constexpr int kScaleRows = 8;  // their scales are converted at once, for one row has few

inline ptrdiff_t whole_vectors(ptrdiff_t n) { return (n + 15) / 16 * 16; }

size_t quantized_row(const Weights& weights, int n_in) {
    return weights.bits == 0 ? 0 : whole_vectors(n_in / 2) + 2 * whole_vectors(weights.scale_stride);
}

void quantize(const float* x, const Weights& weights, int n_in, float* out) {
    auto* to = reinterpret_cast<int16_t*>(out);
    const ptrdiff_t n_groups = weights.scale_stride, length = whole_vectors(n_groups);
    float *dx = out + whole_vectors(n_in / 2), *sums = dx + length;
    for (ptrdiff_t g = 0; g < n_groups; ++g, x += weights.group) {
        Vec total = set(0.0F), tops = set(0.0F);
        for (int i = 0; i < weights.group; i += kLanes) {
            const Vec a = load(x + i);
            total = total + a;
            tops = max(tops, max(a, set(0.0F) - a));
        }
        float lanes[kLanes];
        store(lanes, tops);
        float top = lanes[0];
        for (int lane = 1; lane < kLanes; ++lane) top = lanes[lane] > top ? lanes[lane] : top;
        sums[g] = sum(total);
        // The sum shows a NaN or an infinity, and dx carries it on. Of numbers below 1e-30 the factor could
        // be infinite; they count as 0.
        const bool finite = sums[g] - sums[g] == 0.0F;
        const float factor = finite && top > 1e-30F ? kLargestQuant / top : 0.0F;
        dx[g] = finite ? top / kLargestQuant : NAN;
        for (int i = 0; i < weights.group; i += kUnit, to += kUnit) {
            float rounded[kUnit];
            int16_t ordered[kUnit] = {};
            if (factor > 0.0F) {
                for (int j = 0; j < kUnit; j += kLanes)
                    store(rounded + j, round(load(x + i + j) * set(factor)));
                for (int j = 0; j < kUnit; ++j)
                    ordered[weights.bits == 8 ? j : j % 2 * 16 + j / 2] = static_cast<int16_t>(rounded[j]);
            }
            store_quants(ordered, to);
        }
    }
    for (ptrdiff_t g = n_groups; g < length; ++g) dx[g] = sums[g] = 0.0F;
}

/// The products of one row of weights with R rows of x. The scales may be followed by anything.
template <int bits, int units, int R>
inline void quantized_dots(const unsigned char* q, const float* scales, const float* biases, int n_groups,
                           int n_in, Rows x, Rows out, float* factors) {
    const ptrdiff_t length = whole_vectors(n_groups);
    const Mask behind = less(set(static_cast<float>((n_groups - 1) % kLanes)), lane_numbers());
    const int16_t* quantized[R];
    float of_biases[R];
    for (int r = 0; r < R; ++r) {
        const float* row = x.data + r * x.stride;
        quantized[r] = reinterpret_cast<const int16_t*>(row);
        const float *dx = row + whole_vectors(n_in / 2), *sums = dx + length;
        Vec total = set(0.0F);
        for (int g = 0; g < n_groups; g += kLanes) {
            store(factors + r * length + g, load(scales + g) * load(dx + g));
            Vec bias = load(biases + g);
            if (g + kLanes >= n_groups) bias = zero_where(behind, bias);
            total = fma(bias, load(sums + g), total);
        }
        of_biases[r] = sum(total);
    }
    GroupSums totals[R];
    for (int r = 0; r < R; ++r) totals[r] = no_group_sums();
    for (int g = 0; g < n_groups; ++g) {
        IntSums sums[R];
        for (int r = 0; r < R; ++r) sums[r] = no_sums();
        for (int unit = 0; unit < units; ++unit) {
            const Quants weights = unpack<bits>(q);
            q += kUnit / 8 * bits;
            for (int r = 0; r < R; ++r)
                sums[r] = add_products(weights, quantized[r] + (g * units + unit) * kUnit, sums[r]);
        }
        for (int r = 0; r < R; ++r) totals[r] = fma(sums[r], factors[r * length + g], totals[r]);
    }
    for (int r = 0; r < R; ++r) out.data[r * out.stride] = of_biases[r] + sum(totals[r]);
}

size_t few_rows_scratch(const Weights& weights, int) {
    if (weights.bits == 0) return 0;
    return (2 * kScaleRows + kMostQuantizedRows + 2) * whole_vectors(weights.scale_stride);
}

template <int bits, int units>
inline void quantized_products(Rows x, int n_rows, const Weights& weights, int n_out, int n_in, Rows out,
                               float* scratch) {
    const auto n_groups = static_cast<int>(weights.scale_stride);
    const ptrdiff_t length = whole_vectors(n_groups);
    float *scales = scratch, *biases = scales + (kScaleRows + 1) * length;
    float* factors = biases + (kScaleRows + 1) * length;
    for (int w = 0; w < n_out; ++w) {
        const int at = w % kScaleRows * n_groups;
        if (at == 0) {
            const Weights some = weights.from(w);
            const int n = n_groups * (n_out - w < kScaleRows ? n_out - w : kScaleRows);
            to_floats(some.scales, some.storage, n, scales);
            to_floats(some.biases, some.storage, n, biases);
            if (kQuantCentre<bits> != 0)
                for (int i = 0; i < n; ++i) biases[i] += static_cast<float>(kQuantCentre<bits>) * scales[i];
        }
        const auto* q = static_cast<const unsigned char*>(weights.data) + 4 * w * weights.stride;
        blocks_of_rows<kMostQuantizedRows>(n_rows, [&](auto R, int first) {
            quantized_dots<bits, units, R.value>(q, scales + at, biases + at, n_groups, n_in,
                                                 {x.data + first * x.stride, x.stride},
                                                 {out.data + first * out.stride + w, out.stride}, factors);
        });
    }
}

template <int bits>
inline void quantized_products(Rows x, int n_rows, const Weights& weights, int n_out, int n_in, Rows out,
                               float* scratch) {
    if (weights.group == 32)
        quantized_products<bits, 1>(x, n_rows, weights, n_out, n_in, out, scratch);
    else if (weights.group == 64)
        quantized_products<bits, 2>(x, n_rows, weights, n_out, n_in, out, scratch);
    else
        quantized_products<bits, 4>(x, n_rows, weights, n_out, n_in, out, scratch);
}

void few_rows(Rows x, int n_rows, const Weights& weights, int n_out, int n_in, Rows out, float* scratch) {
    if (weights.bits == 4)
        quantized_products<4>(x, n_rows, weights, n_out, n_in, out, scratch);
    else if (weights.bits == 8)
        quantized_products<8>(x, n_rows, weights, n_out, n_in, out, scratch);
    else
        typed(weights.data, weights.storage,
              [&](const auto* data) { float_products(x, n_rows, data, weights.stride, n_out, n_in, out); });
}

}  // namespace
