// Causal attention of one head without a T x T buffer: what forward (attention_forward.h) and backward
// (attention_backward.h) share.
//
// The forward pass is the online softmax of FlashAttention (Dao et al., 2022): a block of queries
// walks over tiles of keys, carrying each query's maximum, sum and output. The backward pass makes
// the probabilities of a tile again from `lse`, the log-sum-exp of each query's scores.
//
// Lanes hold queries, not keys. Scores are computed transposed, S^T = K Q^T, so that keys and values
// are broadcast from where they lie, softmax goes down the lanes without a horizontal step, and
// O^T += V^T P^T takes the probabilities as they were stored. Only the queries are transposed, once
// for all their keys. A panel is the number of queries that one register block holds.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include "kernels/philox.h"
#include "kernels/table.h"
#include "kernels/tile.h"
#include "kernels/vector_loops.h"
#include "kernels/vector_math.h"

namespace {

using mlxgpt::AttentionHead;
using mlxgpt::Storage;
using mlxgpt::StoredRows;

constexpr int kPanel = kTileVecs * kLanes;

// A tile of keys is read as a whole for every panel of a block of queries, so it should come from L2:
// 128 keys of 64 elements are 32 KB, values as much again; and 128 queries use a tile before it is left,
// which is so much work that it may come from memory at first. The backward pass has two 128 x 128
// matrices of pairs and eight of 128 x 64 at hand, 400 KB, in an L2 of 512 KB or more. What the inner loop
// reads again and again, a panel of queries, scores and outputs, is 4 to 8 KB each and stays in L1.
constexpr int kQueryBlock = 128;
constexpr int kKeyTile = 128;
static_assert(kQueryBlock % kPanel == 0, "a block of queries is whole panels");
static_assert(kKeyTile % 4 == 0, "the dropout generator makes numbers for four keys at once");

// No std:: templates in here: the linker could keep this file's copy of one, with this file's
// instructions, for the whole program.
inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }
inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Hands out parts of a scratch buffer on 64-byte boundaries. From nullptr it only counts.
struct Arena {
    float* base;
    size_t used = 0;
    float* take(size_t n) {
        float* part = base == nullptr ? nullptr : base + used;
        used += (n + 15) / 16 * 16;
        return part;
    }
};

// ---- moving rows ----

/// Calls f with a pointer of the type that rows are stored in.
template <class F>
inline auto typed(StoredRows rows, int first, F f) {
    const ptrdiff_t at = first * rows.stride;
    if (rows.storage == Storage::kBFloat16) return f(static_cast<BFloat16*>(rows.data) + at);
    if (rows.storage == Storage::kFloat16) return f(static_cast<Float16*>(rows.data) + at);
    return f(static_cast<float*>(rows.data) + at);
}

/// Copies n rows of D elements to rows of ld floats, filling up with zeros. False if one is NaN or
/// infinite.
inline bool pack_rows(StoredRows from, int first, int n, int D, float* to, int ld) {
    return typed(from, first, [=](const auto* row) {
        Vec finite = set(0.0F);  // x * 0 is 0, or NaN for a NaN or an infinity
        float* out = to;
        for (int i = 0; i < n; ++i, row += from.stride, out += ld)
            for (int d = 0; d < ld; d += kLanes) {
                const Vec x = d + kLanes <= D ? load(row + d) : load_part(row + d, D - d);
                store(out + d, x);
                finite = fma(x, set(0.0F), finite);
            }
        return sum(finite) == 0.0F;
    });
}

/// The way back for one vector of a row of D elements.
inline void write_vector(StoredRows to, int i, int d, int D, Vec x) {
    typed(to, i, [=](auto* row) {
        if (d + kLanes <= D)
            store(row + d, x);
        else
            store_part(row + d, x, D - d);
    });
}

/// Panels of queries with the lanes across them: to[panel][d][lane] = factor * rows[i][d]. Rows are of ld
/// elements, whole vectors; those of the last panel beyond n are made 0 first.
inline void pack_panels(float* rows, int ld, int n, float factor, float* to) {
    const int n_lanes = round_up(n, kPanel);
    for (int x = n * ld; x < n_lanes * ld; x += kLanes) store(rows + x, set(0.0F));
    for (int i = 0; i < n_lanes; i += kLanes) {
        float* lanes = to + static_cast<ptrdiff_t>(i / kPanel) * ld * kPanel + i % kPanel;
        for (int d = 0; d < ld; d += kLanes) {
            Vec x[kLanes];
            for (int r = 0; r < kLanes; ++r) x[r] = set(factor) * load(rows + (i + r) * ld + d);
            transpose(x);
            for (int c = 0; c < kLanes; ++c) store(lanes + (d + c) * kPanel, x[c]);
        }
    }
}

/// The way back, n queries of a panel into the caller's rows of D elements, each times its factor.
inline void write_panel(const float* panel, int n, int D, const float* factors, StoredRows to, int first) {
    for (int lane = 0; lane < n; lane += kLanes)
        for (int d = 0; d < D; d += kLanes) {
            Vec x[kLanes];
            for (int c = 0; c < kLanes; ++c)
                x[c] = load(panel + (d + c) * kPanel + lane) * load(factors + lane);
            transpose(x);
            for (int r = 0; r < least(kLanes, n - lane); ++r) write_vector(to, first + lane + r, d, D, x[r]);
        }
}

/// A head's keys and values, packed in rows of ld as far as queries have come to see them.
struct PackedKeys {
    int ld;                      // D, filled up to whole vectors
    float *k, *v;                // [T_k][ld]
    float *k_finite, *v_finite;  // a flag for each tile
    int n = 0;                   // keys that are there: a multiple of kKeyTile, or T_k

    PackedKeys(Arena& arena, int T_k, int D) : ld(round_up(D, kLanes)) {
        k = arena.take(static_cast<size_t>(T_k) * ld);
        v = arena.take(static_cast<size_t>(T_k) * ld);
        k_finite = arena.take(static_cast<size_t>(T_k) / kKeyTile + 1);
        v_finite = arena.take(static_cast<size_t>(T_k) / kKeyTile + 1);
    }

    void extend(const AttentionHead& head, int n_seen) {
        for (; n < n_seen; n += kKeyTile) {
            const int tile = n / kKeyTile;
            const int rows = least(kKeyTile, head.T_k - n);
            const ptrdiff_t at = static_cast<ptrdiff_t>(n) * ld;
            k_finite[tile] = pack_rows(head.k, n, rows, head.D, k + at, ld) ? 1.0F : 0.0F;
            v_finite[tile] = pack_rows(head.v, n, rows, head.D, v + at, ld) ? 1.0F : 0.0F;
        }
    }
};

// ---- which pairs of query and key exist ----

/// Keys of the tile at j0 that the last of `n` queries from i0 on sees.
inline int visible_keys(const AttentionHead& head, int i0, int n, int j0) {
    const int last = head.causal ? least(head.T_k, i0 + n + head.T_k - head.T_q) : head.T_k;
    return least(last - j0, kKeyTile);
}

/// Whether query `first + lane` sees key j, lane by lane, for vector v of a panel. The panel's first
/// query sees keys below `seen_by_first`.
inline Mask visible(int seen_by_first, int j, int v) {
    return less(set(static_cast<float>(j - seen_by_first)),
                lane_numbers() + set(static_cast<float>(v * kLanes)));
}

/// Keys that query i sees.
inline int keys_seen(const AttentionHead& head, int i) {
    return head.causal ? i + 1 + head.T_k - head.T_q : head.T_k;
}

/// Dropout factors of one panel: to[j][lane] = 0 or 1 / (1 - dropout) for n keys from j0 on, j0 a
/// multiple of 4. A number is a function of seed, batch, head, query and key alone.
inline void dropout_factors(const AttentionHead& head, int i0, int j0, int n, float* to) {
    const DropoutFactors factors(head.dropout);
    for (int j = 0; j < n; j += 4)
        for (int v = 0; v < kTileVecs; ++v) {
            const UVec query = lane_numbers_u() + set_u(static_cast<uint32_t>(i0 + v * kLanes));
            const Random4 random = philox(set_u(static_cast<uint32_t>(j0 + j) / 4), query, set_u(head.head),
                                          set_u(head.batch), head.seed);
            for (int k = 0; k < least(4, n - j); ++k)
                store(to + (j + k) * kPanel + v * kLanes, factors(random.word[k]));
        }
}

void dropout_mask(const AttentionHead& head, float* mask) {
    float factors[4 * kPanel];
    for (int i0 = 0; i0 < head.T_q; i0 += kPanel)
        for (int j0 = 0; j0 < head.T_k; j0 += 4) {
            const int n = least(4, head.T_k - j0);
            dropout_factors(head, i0, j0, n, factors);
            for (int lane = 0; lane < least(kPanel, head.T_q - i0); ++lane)
                for (int j = 0; j < n; ++j)
                    mask[static_cast<ptrdiff_t>(i0 + lane) * head.T_k + j0 + j] = factors[j * kPanel + lane];
        }
}

}  // namespace
