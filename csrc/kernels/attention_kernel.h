// Causal attention of one head without a T x T buffer: what attention_forward.h and attention_backward.h
// share.
//
// The forward pass is the online softmax of FlashAttention (Dao et al. 2022): a block of queries goes through
// the tiles of keys and carries each query's maximum, sum and output from tile to tile. The backward pass
// recomputes the probabilities of a tile from `lse`, the log-sum-exp of each query's scores.
//
// The lanes of a vector hold queries, not keys. Scores are computed transposed, S^T = K Q^T: then keys and
// values are broadcast from memory as they are stored, softmax needs no sums across lanes, and O^T += V^T P^T
// reads the probabilities as they were written. Only the queries are transposed, once for all keys. A panel
// is as many queries as one register block holds.
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

// Each panel of a block of queries reads a whole tile of keys, so a tile should fit L2: 128 keys of 64
// elements are 32 KB, and the values another 32 KB. A block of 128 queries is so much work on a tile that the
// tile's first read may come from memory. The backward pass works on two 128 x 128 matrices, of probabilities
// and their gradients, and eight 128 x 64 matrices: 400 KB, for an L2 of 512 KB or more. The inner loop
// rereads a panel of queries, of scores and of outputs: 4 to 8 KB each, which stay in L1.
constexpr int kQueryBlock = 128;
constexpr int kKeyTile = 128;
static_assert(kQueryBlock % kPanel == 0, "a block of queries is whole panels");
static_assert(kKeyTile % 4 == 0, "the dropout generator makes numbers for four keys at once");

// No std::min or other templates of the C++ library in kernels: of all copies in the program the linker keeps
// one, and that could be the copy compiled for this instruction set.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
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

// ---- packing rows ----

/// Calls f with a pointer to row `first`, of the type that the rows are stored in.
template <class F>
inline auto typed(StoredRows rows, int first, F f) {
    const ptrdiff_t at = first * rows.stride;
    if (rows.storage == Storage::kBFloat16) return f(static_cast<BFloat16*>(rows.data) + at);
    if (rows.storage == Storage::kFloat16) return f(static_cast<Float16*>(rows.data) + at);
    return f(static_cast<float*>(rows.data) + at);
}

/// Copies n rows of D elements to rows of ld floats, padded with zeros. Returns whether all elements are
/// finite.
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

/// Writes one vector of row i, at element d, to rows of D elements.
inline void write_vector(StoredRows to, int i, int d, int D, Vec x) {
    typed(to, i, [=](auto* row) {
        if (d + kLanes <= D)
            store(row + d, x);
        else
            store_part(row + d, x, D - d);
    });
}

/// Transposes n rows of ld elements (a multiple of kLanes) into panels: to[panel][d][lane] = factor *
/// rows[i][d], where row i is lane i % kPanel of panel i / kPanel. The last panel's rows from n on are set to
/// 0 first.
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

/// Transposes n queries of a panel back, into rows of D elements from row `first` on, each times its factor.
inline void write_panel(const float* panel, int n, int D, const float* factors, StoredRows to, int first) {
    for (int lane = 0; lane < n; lane += kLanes)
        for (int d = 0; d < D; d += kLanes) {
            Vec x[kLanes];
            for (int c = 0; c < kLanes; ++c)
                x[c] = load(panel + (d + c) * kPanel + lane) * load(factors + lane);
            transpose(x);
            for (int r = 0; r < min(kLanes, n - lane); ++r) write_vector(to, first + lane + r, d, D, x[r]);
        }
}

/// A head's keys and values, packed into rows of ld floats. They are packed when the first query sees them.
struct PackedKeys {
    int ld;                      // D rounded up to whole vectors
    float *k, *v;                // [T_k][ld]
    float *k_finite, *v_finite;  // for each tile, 1 if it is finite, else 0
    int n = 0;                   // keys packed so far: a multiple of kKeyTile, or T_k

    PackedKeys(Arena& arena, int T_k, int D) : ld(round_up(D, kLanes)) {
        k = arena.take(static_cast<size_t>(T_k) * ld);
        v = arena.take(static_cast<size_t>(T_k) * ld);
        k_finite = arena.take(static_cast<size_t>(T_k) / kKeyTile + 1);
        v_finite = arena.take(static_cast<size_t>(T_k) / kKeyTile + 1);
    }

    /// Packs the keys below n_seen that are not packed yet, in whole tiles.
    void extend(const AttentionHead& head, int n_seen) {
        for (; n < n_seen; n += kKeyTile) {
            const int tile = n / kKeyTile;
            const int rows = min(kKeyTile, head.T_k - n);
            const ptrdiff_t at = static_cast<ptrdiff_t>(n) * ld;
            k_finite[tile] = pack_rows(head.k, n, rows, head.D, k + at, ld) ? 1.0F : 0.0F;
            v_finite[tile] = pack_rows(head.v, n, rows, head.D, v + at, ld) ? 1.0F : 0.0F;
        }
    }
};

// ---- which keys a query sees ----

/// The number of keys, from j0 on and within a tile, that the last of n queries from i0 on sees.
inline int visible_keys(const AttentionHead& head, int i0, int n, int j0) {
    const int last = head.causal ? min(head.T_k, i0 + n + head.T_k - head.T_q) : head.T_k;
    return min(last - j0, kKeyTile);
}

/// For each lane of vector v of a panel, whether its query sees key j. The panel's first query sees the keys
/// below seen_by_first, each further query one more.
inline Mask visible(int seen_by_first, int j, int v) {
    return less(set(static_cast<float>(j - seen_by_first)),
                lane_numbers() + set(static_cast<float>(v * kLanes)));
}

/// The number of keys that query i sees.
inline int keys_seen(const AttentionHead& head, int i) {
    return head.causal ? i + 1 + head.T_k - head.T_q : head.T_k;
}

/// The dropout factors of one panel, to[j][lane] = 0 or 1 / (1 - dropout), for n keys from j0 on; j0 is a
/// multiple of 4. A factor is a function of seed, batch, head, query and key alone.
inline void dropout_factors(const AttentionHead& head, int i0, int j0, int n, float* to) {
    const DropoutFactors factors(head.dropout);
    for (int j = 0; j < n; j += 4)
        for (int v = 0; v < kTileVecs; ++v) {
            const UVec query = lane_numbers_u() + set_u(static_cast<uint32_t>(i0 + v * kLanes));
            const Random4 random = philox(set_u(static_cast<uint32_t>(j0 + j) / 4), query, set_u(head.head),
                                          set_u(head.batch), head.seed);
            for (int k = 0; k < min(4, n - j); ++k)
                store(to + (j + k) * kPanel + v * kLanes, factors(random.word[k]));
        }
}

void dropout_mask(const AttentionHead& head, float* mask) {
    float factors[4 * kPanel];
    for (int i0 = 0; i0 < head.T_q; i0 += kPanel)
        for (int j0 = 0; j0 < head.T_k; j0 += 4) {
            const int n = min(4, head.T_k - j0);
            dropout_factors(head, i0, j0, n, factors);
            for (int lane = 0; lane < min(kPanel, head.T_q - i0); ++lane)
                for (int j = 0; j < n; ++j)
                    mask[static_cast<ptrdiff_t>(i0 + lane) * head.T_k + j0 + j] = factors[j * kPanel + lane];
        }
}

}  // namespace
