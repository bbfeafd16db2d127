// The product of few rows of x and a matrix of weights in any storage, as in decoding. Each weight is used
// only once or a few times, so reading the weights from memory takes all the time, and a BLAS would not help.
//
// Weights are read from memory once: a few rows of them stay in L1 while they are multiplied by every row of
// x. Each result has one accumulator, which adds up its terms in order, so that a row of x gets the same bits
// alone and among other rows.
//
// If the weights are quantized, x is quantized too, to 16 bits with a scale for each group of weights. Then
// the sum of q x over a group is exact in 32-bit integers (128 * 255 * 32767 < 2^31), and no weight is
// converted to float. The relative error is about 1e-5: a rounding error is at most 1 / 65534 of the largest
// x of its group.
//
// Included by target_<isa>.cpp after its Vec and Quants.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/stored_weights.h"
#include "kernels/table.h"
#include "kernels/vector_loops.h"

namespace {

using mlxgpt::Rows;
using mlxgpt::Weights;

// ---- floats ----

// The matrix is divided into this many parts, and one row of each is read at a time. The hardware prefetches
// a few streams and never beyond a page, so that reading adjacent rows, of a page or less, gets only half the
// bandwidth.
constexpr int kStreams = 4;

// Rows of x at a time: with kStreams rows of weights, as many sums as in a register block of tile.h.
constexpr int kMostRows = kTileRows * kTileVecs / kStreams;

/// The dot products of W rows of weights, `apart` rows from one to the next, and R rows of x. out has the
/// same distance between columns.
template <int W, int R, class T>
inline void dots(const T* weights, ptrdiff_t stride, int n_in, Rows x, Rows out, ptrdiff_t apart) {
    Vec sums[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) sums[r][w] = set(0.0F);
    for_vectors(n_in, [&](ptrdiff_t i, auto some) {
        Vec column[R];
        for (int r = 0; r < R; ++r) column[r] = some.read(x.data + r * x.stride + i);
        for (int w = 0; w < W; ++w) {
            const Vec weight = some.read(weights + w * apart * stride + i);
            for (int r = 0; r < R; ++r) sums[r][w] = fma(weight, column[r], sums[r][w]);
        }
    });
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) out.data[r * out.stride + w * apart] = sum(sums[r][w]);
}

template <int n>
struct Constant {
    static constexpr int value = n;
};

/// Calls f(number, first) for blocks of n rows. The number is a Constant: R while as many rows are left, then
/// fewer.
template <int R, class F>
inline void blocks_of_rows(int n, F f, int first = 0) {
    if constexpr (R > 0) {
        for (; n - first >= R; first += R) f(Constant<R>{}, first);
        blocks_of_rows<R - 1>(n, f, first);
    }
}

/// Calls f(W, first) for n rows of weights, each of them once: a call has the rows first + w * (n / kStreams)
/// for w < W.
template <class F>
inline void streams_of_rows(int n, F f) {
    const int part = n / kStreams;
    for (int w = 0; w < part; ++w) f(Constant<kStreams>{}, w);
    for (int w = kStreams * part; w < n; ++w) f(Constant<1>{}, w);
}

inline Rows part_of(Rows a, ptrdiff_t row, ptrdiff_t column) {
    return {a.data + row * a.stride + column, a.stride};
}

template <class T>
inline void float_products(Rows x, int n_rows, const T* weights, ptrdiff_t stride, int n_out, int n_in,
                           Rows out) {
    streams_of_rows(n_out, [&](auto W, int w) {
        blocks_of_rows<kMostRows>(n_rows, [&](auto R, int first) {
            dots<W.value, R.value>(weights + w * stride, stride, n_in, part_of(x, first, 0),
                                   part_of(out, first, w), n_out / kStreams);
        });
    });
}

// ---- quantized ----

// A quantized row of x is n_in int16, then each group's scale dx, then each group's sum times dx. Scales and
// sums are padded with zeros to whole vectors. The int16 come in units of 32, each in the order in which
// `unpack` gives the weights: as they are for 8 bits; for 4 bits first those of the low halves of 16 bytes,
// then those of the high halves.
constexpr int kUnit = 32;
constexpr int kMostQuantizedRows = 2;  // rows of x at a time, so that sums and weights stay in registers
constexpr int kScaleRows = 8;  // rows whose scales are converted at a time: a single row has only a few

inline ptrdiff_t whole_vectors(ptrdiff_t n) { return (n + 15) / 16 * 16; }

size_t quantized_row(const Weights& weights, int n_in) {
    return weights.bits == 0 ? 0 : whole_vectors(n_in / 2) + 2 * whole_vectors(weights.scale_stride);
}

void quantize(const float* x, const Weights& weights, int n_in, float* out) {
    auto* to = reinterpret_cast<int16_t*>(out);
    const ptrdiff_t n_groups = weights.scale_stride, length = whole_vectors(n_groups);
    float *dx = out + whole_vectors(n_in / 2), *sums = dx + length;
    for (ptrdiff_t g = 0; g < n_groups; ++g, x += weights.group) {
        Vec tops = set(0.0F), finite = set(0.0F);  // x * 0 is 0, or NaN for a NaN or an infinity
        for (int i = 0; i < weights.group; i += kLanes) {
            const Vec a = load(x + i);
            tops = max(tops, max(a, set(0.0F) - a));
            finite = fma(a, set(0.0F), finite);
        }
        const float top = largest(tops);
        const bool usable = sum(finite) == 0.0F;
        // Below 1e-30 the factor could be infinite, so such numbers count as 0.
        const float factor = usable && top > 1e-30F ? kLargestQuant / top : 0.0F;
        dx[g] = usable ? top / kLargestQuant : NAN;
        Vec total = set(0.0F);  // a sum of integers, which is exact
        for (int i = 0; i < weights.group; i += kUnit, to += kUnit) {
            float rounded[kUnit];
            int16_t ordered[kUnit] = {};
            if (factor > 0.0F) {
                for (int j = 0; j < kUnit; j += kLanes) {
                    const Vec a = round(load(x + i + j) * set(factor));
                    store(rounded + j, a);
                    total = total + a;
                }
                for (int j = 0; j < kUnit; ++j)
                    ordered[weights.bits == 8 ? j : j % 2 * 16 + j / 2] = static_cast<int16_t>(rounded[j]);
            }
            store_quants(ordered, to);
        }
        // The sum is of the rounded x, as in the products: then the bias corrects exactly for q being
        // unsigned.
        sums[g] = dx[g] * sum(total);
    }
    for (ptrdiff_t g = n_groups; g < length; ++g) dx[g] = sums[g] = 0.0F;
}

/// The scales and biases of kScaleRows rows of each stream, as floats. Those of the next row follow directly.
struct Scales {
    float *scales, *biases;
    ptrdiff_t apart;  // from one stream to the next
};

/// Like dots, for quantized weights and x.
template <int bits, int units, int W, int R>
inline void quantized_dots(const unsigned char* q, ptrdiff_t stride, Scales all, int n_groups, int n_in,
                           Rows x, Rows out, ptrdiff_t apart, float* factors) {
    const ptrdiff_t length = whole_vectors(n_groups);
    const Mask behind = less(set(static_cast<float>((n_groups - 1) % kLanes)), lane_numbers());
    const int16_t* quantized[R];
    GroupSums totals[R][W];
    for (int r = 0; r < R; ++r) {
        const float* row = x.data + r * x.stride;
        quantized[r] = reinterpret_cast<const int16_t*>(row);
        const float *dx = row + whole_vectors(n_in / 2), *sums = dx + length;
        for (int w = 0; w < W; ++w) {
            const float *scales = all.scales + w * all.apart, *biases = all.biases + w * all.apart;
            Vec total = set(0.0F);
            for (int g = 0; g < n_groups; g += kLanes) {
                store(factors + (r * W + w) * length + g, load(scales + g) * load(dx + g));
                Vec bias = load(biases + g);
                if (g + kLanes >= n_groups) bias = zero_where(behind, bias);
                total = fma(bias, load(sums + g), total);
            }
            totals[r][w] = group_sums(total);
        }
    }
    constexpr int kBytes = units * kUnit / 8 * bits;  // of a group
    for (int g = 0; g < n_groups; ++g, q += kBytes) {
        decltype(load_quants(quantized[0])) group[R][units];  // of x, for all W rows
        for (int r = 0; r < R; ++r)
            for (int unit = 0; unit < units; ++unit)
                group[r][unit] = load_quants(quantized[r] + (g * units + unit) * kUnit);
        for (int w = 0; w < W; ++w) {
            const unsigned char* row = q + w * apart * stride;
            IntSums sums[R];
            for (int r = 0; r < R; ++r) sums[r] = no_sums();
            for (int unit = 0; unit < units; ++unit) {
                const Quants weights = unpack<bits>(row + unit * kUnit / 8 * bits);
                for (int r = 0; r < R; ++r) sums[r] = add_products(weights, group[r][unit], sums[r]);
            }
            for (int r = 0; r < R; ++r)
                totals[r][w] = fma(sums[r], factors[(r * W + w) * length + g], totals[r][w]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) out.data[r * out.stride + w * apart] = sum(totals[r][w]);
}

size_t few_rows_scratch(const Weights& weights, int) {
    if (weights.bits == 0) return 0;
    return kStreams * (2 * (kScaleRows + 1) + kMostQuantizedRows) * whole_vectors(weights.scale_stride);
}

template <int bits, int units>
inline void quantized_products(Rows x, int n_rows, const Weights& weights, int n_out, int n_in, Rows out,
                               float* scratch) {
    const auto n_groups = static_cast<int>(weights.scale_stride);
    const ptrdiff_t length = whole_vectors(n_groups), apart = (kScaleRows + 1) * length;
    const Scales all{scratch, scratch + kStreams * apart, apart};
    float* factors = all.biases + kStreams * apart;
    const int part = n_out / kStreams;
    streams_of_rows(n_out, [&](auto W, int w) {
        // Converts the scales of the next kScaleRows rows of each stream. The last rows, fewer than kStreams,
        // come one by one.
        const int row = W.value > 1 ? w % kScaleRows : 0, left = W.value > 1 ? part - w : 1;
        if (row == 0)
            for (int stream = 0; stream < W.value; ++stream) {
                const Weights some = weights.from(w + stream * part);
                const int n = n_groups * (left < kScaleRows ? left : kScaleRows);
                float *scales = all.scales + stream * apart, *biases = all.biases + stream * apart;
                to_floats(some.scales, some.storage, n, scales);
                to_floats(some.biases, some.storage, n, biases);
                if (kQuantCentre<bits> != 0)
                    for (int i = 0; i < n; ++i)
                        biases[i] += static_cast<float>(kQuantCentre<bits>) * scales[i];
            }
        const Scales own{all.scales + row * n_groups, all.biases + row * n_groups, apart};
        const auto* q = static_cast<const unsigned char*>(weights.data) + 4 * w * weights.stride;
        blocks_of_rows<kMostQuantizedRows>(n_rows, [&](auto R, int first) {
            quantized_dots<bits, units, W.value, R.value>(q, 4 * weights.stride, own, n_groups, n_in,
                                                          part_of(x, first, 0), part_of(out, first, w), part,
                                                          factors);
        });
    });
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
