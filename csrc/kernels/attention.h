// Causal attention of one head, forward and backward, without a T x T buffer.
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
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

#include <float.h>
#include <math.h>

#include "math.h"
#include "random.h"
#include "tile.h"

namespace {

using mlxgpt::AttentionHead;
using mlxgpt::Rows;

constexpr int kPanel = kTileVecs * kLanes;

// A tile of 64 keys with 64 elements is 16 KB, and a panel's queries, scores and outputs 4 KB each:
// they share a 32 KB L1. 64 queries use a tile of keys before it is left, so that keys from L3 or
// memory cost a byte for every 64 multiply-adds or so; and the backward pass's eleven 64 x 64 matrices
// (180 KB) fit the smallest usual L2 of 256 KB.
constexpr int kQueryBlock = 64;
constexpr int kKeyTile = 64;
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

/// Copies n rows of D elements to rows of ld, filling up with zeros. False if one is NaN or infinite.
inline bool pack_rows(Rows from, int first, int n, int D, float* to, int ld) {
    Vec finite = set(0.0F);  // x * 0 is 0, or NaN for a NaN or an infinity
    float finite_rest = 0.0F;
    for (int i = 0; i < n; ++i) {
        const float* row = from.data + (first + i) * from.stride;
        float* out = to + static_cast<ptrdiff_t>(i) * ld;
        int d = 0;
        for (; d + kLanes <= D; d += kLanes) {
            const Vec x = load(row + d);
            store(out + d, x);
            finite = fma(x, set(0.0F), finite);
        }
        for (; d < D; ++d) {
            out[d] = row[d];
            finite_rest += row[d] * 0.0F;
        }
        for (; d < ld; ++d) out[d] = 0.0F;
    }
    return sum(finite) + finite_rest == 0.0F;
}

/// Panels of queries with the lanes across them: to[panel][d][lane] = factor * rows[i][d].
inline void pack_panels(const float* rows, int ld, int n, int D, float factor, float* to) {
    for (int i0 = 0; i0 < n; i0 += kPanel, to += static_cast<ptrdiff_t>(D) * kPanel)
        for (int lane = 0; lane < kPanel; ++lane)
            for (int d = 0; d < D; ++d)
                to[d * kPanel + lane] =
                    i0 + lane < n ? factor * rows[static_cast<ptrdiff_t>(i0 + lane) * ld + d] : 0.0F;
}

/// The way back, into the caller's rows; each query is multiplied by its factor.
inline void write_panel(const float* panel, int n, int D, const float* factor, Rows to, int first) {
    for (int lane = 0; lane < n; ++lane) {
        float* row = to.data + (first + lane) * to.stride;
        for (int d = 0; d < D; ++d) row[d] = panel[d * kPanel + lane] * factor[lane];
    }
}

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
    const Vec limit = set(head.dropout * 16777216.0F);  // against 24 random bits
    const Vec kept = set(1.0F / (1.0F - head.dropout));
    for (int j = 0; j < n; j += 4)
        for (int v = 0; v < kTileVecs; ++v) {
            const UVec query = lane_numbers_u() + set_u(static_cast<uint32_t>(i0 + v * kLanes));
            const Random4 random = philox(set_u(static_cast<uint32_t>(j0 + j) / 4), query, set_u(head.head),
                                          set_u(head.batch), head.seed);
            for (int k = 0; k < least(4, n - j); ++k)
                store(to + (j + k) * kPanel + v * kLanes,
                      select(less(top_24_bits(random.word[k]), limit), set(0.0F), kept));
        }
}

// ---- forward ----

/// What a block of queries carries along its keys, and the keys and values of the head.
struct ForwardScratch {
    Arena arena;
    int ld;                   // elements of a packed row: D, filled up to whole vectors
    float *k, *v;             // [T_k][ld]
    float* v_finite;          // a flag for each tile of v
    float* q_rows;            // [kQueryBlock][ld]
    float *q, *out;           // panels of [D][kPanel]
    float *maximum, *sum;     // [kQueryBlock]; scores are in units of log 2
    float *scores, *factors;  // [kKeyTile][kPanel]

    ForwardScratch(float* base, int T_k, int D) : arena{base}, ld(round_up(D, kLanes)) {
        k = arena.take(static_cast<size_t>(T_k) * ld);
        v = arena.take(static_cast<size_t>(T_k) * ld);
        v_finite = arena.take(static_cast<size_t>(T_k) / kKeyTile + 1);
        q_rows = arena.take(static_cast<size_t>(kQueryBlock) * ld);
        q = arena.take(static_cast<size_t>(kQueryBlock) * D);
        out = arena.take(static_cast<size_t>(kQueryBlock) * D);
        maximum = arena.take(kQueryBlock);
        sum = arena.take(kQueryBlock);
        scores = arena.take(kKeyTile * kPanel);
        factors = arena.take(kKeyTile * kPanel);
    }
};

/// Turns a panel's scores [n][kPanel] into exp(score - maximum), brings the panel's maximum and sum
/// up to date, and multiplies its outputs by what the old maximum was too small.
inline void softmax_step(float* scores, int n, int seen_by_first, int j0, float* maximum, float* total,
                         float* out, int D) {
    for (int v = 0; v < kTileVecs; ++v) {
        float* column = scores + v * kLanes;
        const Vec before = load(maximum + v * kLanes);
        Vec now = before;
        const int n_full = most(0, least(n, seen_by_first - j0));
        for (int j = 0; j < n_full; ++j) now = max(load(column + j * kPanel), now);
        for (int j = n_full; j < n; ++j) {
            const Vec s =
                select(visible(seen_by_first, j0 + j, v), load(column + j * kPanel), set(-INFINITY));
            store(column + j * kPanel, s);
            now = max(s, now);
        }
        // The maximum starts at -FLT_MAX instead of -inf: a query whose scores are all -inf so far
        // gets exp(-inf + FLT_MAX) = 0 here, not exp(-inf + inf).
        const Vec shrink = exp2_nonpositive(before - now);
        Vec sums = load(total + v * kLanes) * shrink;
        for (int j = 0; j < n; ++j) {
            const Vec p = exp2_nonpositive(load(column + j * kPanel) - now);
            store(column + j * kPanel, p);
            sums = sums + p;
        }
        store(maximum + v * kLanes, now);
        store(total + v * kLanes, sums);
        for (int d = 0; d < D; ++d) {
            float* o = out + d * kPanel + v * kLanes;
            store(o, load(o) * shrink);
        }
    }
}

/// out[d][lane] += v[j][d] * p[j][lane] over the pairs that exist, one by one. In a tile on the
/// diagonal the fast product adds 0 * v[j][d] for a key j that the query does not see: nothing, unless
/// v holds a NaN or an infinity.
inline void add_visible_values(const float* v, int ld, const float* p, int n, int seen_by_first, int j0,
                               float* out, int D) {
    for (int j = 0; j < n; ++j)
        for (int lane = most(0, j0 + j + 1 - seen_by_first); lane < kPanel; ++lane)
            for (int d = 0; d < D; ++d)
                out[d * kPanel + lane] += v[static_cast<ptrdiff_t>(j) * ld + d] * p[j * kPanel + lane];
}

inline void forward_panel(const AttentionHead& head, ForwardScratch& s, int i0, int panel, int n_panel,
                          int j0) {
    const int n = visible_keys(head, i0, n_panel, j0);
    if (n <= 0) return;
    const int D = head.D;
    const int seen = keys_seen(head, i0);
    const float* k = s.k + static_cast<ptrdiff_t>(j0) * s.ld;
    const float* v = s.v + static_cast<ptrdiff_t>(j0) * s.ld;
    float* out = s.out + static_cast<ptrdiff_t>(panel) * D * kPanel;

    product<kTileVecs>(n, {k, s.ld, 1}, s.q + static_cast<ptrdiff_t>(panel) * D * kPanel, kPanel, s.scores,
                       kPanel, D, false);
    softmax_step(s.scores, n, seen, j0, s.maximum + panel * kPanel, s.sum + panel * kPanel, out, D);
    if (head.dropout > 0.0F) {
        dropout_factors(head, i0, j0, n, s.factors);
        for (int x = 0; x < n * kPanel; x += kLanes)
            store(s.scores + x, load(s.scores + x) * load(s.factors + x));
    }
    if (j0 + n <= seen || s.v_finite[j0 / kKeyTile] != 0.0F)
        product<kTileVecs>(D, {v, 1, s.ld}, s.scores, kPanel, out, kPanel, n, true);
    else
        add_visible_values(v, s.ld, s.scores, n, seen, j0, out, D);
}

size_t forward_scratch(int T_k, int D) { return ForwardScratch(nullptr, T_k, D).arena.used; }

void attention_forward(const AttentionHead& head, int first, int step, float* scratch) {
    ForwardScratch s(scratch, head.T_k, head.D);
    const int D = head.D;
    int packed = 0;  // keys that lie in s.k and s.v by now: as many as the queries so far have seen
    for (int i0 = first * kQueryBlock; i0 < head.T_q; i0 += step * kQueryBlock) {
        const int n_q = least(kQueryBlock, head.T_q - i0);
        const int n_k = least(head.T_k, keys_seen(head, i0 + n_q - 1));
        pack_rows(head.q, i0, n_q, D, s.q_rows, s.ld);
        pack_panels(s.q_rows, s.ld, n_q, D, head.scale * kLog2E, s.q);
        for (int i = 0; i < kQueryBlock; ++i) {
            s.maximum[i] = -FLT_MAX;
            s.sum[i] = 0.0F;
        }
        for (int x = 0; x < kQueryBlock * D; ++x) s.out[x] = 0.0F;

        for (; packed < n_k; packed += kKeyTile) {
            const int n = least(kKeyTile, head.T_k - packed);
            const ptrdiff_t at = static_cast<ptrdiff_t>(packed) * s.ld;
            pack_rows(head.k, packed, n, D, s.k + at, s.ld);
            s.v_finite[packed / kKeyTile] = pack_rows(head.v, packed, n, D, s.v + at, s.ld) ? 1.0F : 0.0F;
        }
        for (int j0 = 0; j0 < n_k; j0 += kKeyTile)
            for (int panel = 0; panel * kPanel < n_q; ++panel)
                forward_panel(head, s, i0 + panel * kPanel, panel, least(kPanel, n_q - panel * kPanel), j0);

        for (int panel = 0; panel * kPanel < n_q; ++panel) {
            const int n = least(kPanel, n_q - panel * kPanel);
            float* sum = s.sum + panel * kPanel;
            for (int i = 0; i < n; ++i) {
                head.lse[i0 + panel * kPanel + i] = kLn2 * (s.maximum[panel * kPanel + i] + log2f(sum[i]));
                sum[i] = 1.0F / sum[i];
            }
            write_panel(s.out + static_cast<ptrdiff_t>(panel) * D * kPanel, n, D, sum, head.out,
                        i0 + panel * kPanel);
        }
    }
}

// ---- backward ----

/// What a block of queries needs to walk over the keys again. A row of `p` and `ds` holds all queries
/// of the block, 16 floats more so that rows do not fall on the same cache sets.
struct BackwardScratch {
    static constexpr int kPairs = kQueryBlock + 16;
    Arena arena;
    int ld;
    float *k, *v;               // [kKeyTile][ld]
    float *q_rows, *dout_rows;  // [kQueryBlock][ld]
    float *q, *dout, *dq;       // panels of [D][kPanel]
    float *lse, *delta;         // [kQueryBlock]
    float *p, *ds;              // [kKeyTile][kPairs]
    float* factors;             // [kKeyTile][kPanel]

    BackwardScratch(float* base, int D) : arena{base}, ld(round_up(D, kLanes)) {
        const size_t rows = static_cast<size_t>(kQueryBlock) * ld;
        k = arena.take(static_cast<size_t>(kKeyTile) * ld);
        v = arena.take(static_cast<size_t>(kKeyTile) * ld);
        q_rows = arena.take(rows);
        dout_rows = arena.take(rows);
        q = arena.take(static_cast<size_t>(kQueryBlock) * D);
        dout = arena.take(static_cast<size_t>(kQueryBlock) * D);
        dq = arena.take(static_cast<size_t>(kQueryBlock) * D);
        lse = arena.take(kQueryBlock);
        delta = arena.take(kQueryBlock);
        p = arena.take(kKeyTile * kPairs);
        ds = arena.take(kKeyTile * kPairs);
        factors = arena.take(kKeyTile * kPanel);
    }
};

/// One panel's probabilities and score gradients in a tile of keys: P^T = exp(K Q^T - lse) and
/// dS^T = P^T * (factors * (V dO^T) - delta); p is left as what multiplied the values, factors * P^T.
inline void backward_pairs(const AttentionHead& head, BackwardScratch& s, int i0, int panel, int n, int j0) {
    const int D = head.D;
    const int seen = keys_seen(head, i0);
    constexpr int kPairs = BackwardScratch::kPairs;
    float* p = s.p + panel * kPanel;
    float* ds = s.ds + panel * kPanel;
    const ptrdiff_t at = static_cast<ptrdiff_t>(panel) * D * kPanel;
    product<kTileVecs>(n, {s.k, s.ld, 1}, s.q + at, kPanel, p, kPairs, D, false);
    product<kTileVecs>(n, {s.v, s.ld, 1}, s.dout + at, kPanel, ds, kPairs, D, false);
    if (head.dropout > 0.0F) dropout_factors(head, i0, j0, n, s.factors);

    for (int v = 0; v < kTileVecs; ++v) {
        const Vec lse = load(s.lse + panel * kPanel + v * kLanes);
        const Vec delta = load(s.delta + panel * kPanel + v * kLanes);
        for (int j = 0; j < n; ++j) {
            float* to_p = p + j * kPairs + v * kLanes;
            float* to_ds = ds + j * kPairs + v * kLanes;
            Vec prob = exp2_nonpositive(load(to_p) - lse);
            Vec dp = load(to_ds);
            if (j0 + j >= seen) prob = select(visible(seen, j0 + j, v), prob, set(0.0F));
            Vec kept = prob;
            if (head.dropout > 0.0F) {
                const Vec factor = load(s.factors + j * kPanel + v * kLanes);
                kept = prob * factor;
                dp = dp * factor;
            }
            Vec grad = prob * (dp - delta);
            if (j0 + j >= seen) grad = select(visible(seen, j0 + j, v), grad, set(0.0F));
            store(to_p, kept);
            store(to_ds, grad);
        }
    }
}

/// sums[j][d] += w[j][i] * rows[i][d]: what a block of n_q queries adds to a tile of n keys. A query is
/// left out where the first key of a register block is hidden from it.
inline void add_to_keys(const float* w, int n, int hidden, int n_q, const float* rows, int ld, float* sums) {
    constexpr int kPairs = BackwardScratch::kPairs;
    for (int j = 0; j < n; j += kTileRows) {
        const int n_rows = least(kTileRows, n - j);
        const int i = most(0, j + hidden);  // the first query that sees key j
        if (i >= n_q) break;
        const Broadcast a{w + j * kPairs + i, kPairs, 1};
        const float* b = rows + static_cast<ptrdiff_t>(i) * ld;
        float* c = sums + static_cast<ptrdiff_t>(j) * ld;
        int d = 0;
        for (; d + kPanel <= ld; d += kPanel)
            product<kTileVecs>(n_rows, a, b + d, ld, c + d, ld, n_q - i, true);
        for (; d < ld; d += kLanes) product<1>(n_rows, a, b + d, ld, c + d, ld, n_q - i, true);
    }
}

/// The three sums of a tile on the diagonal, pair by pair: for inputs that are not finite, see
/// add_visible_values.
inline void add_visible_pairs(const AttentionHead& head, BackwardScratch& s, int i0, int n_q, int j0, int n,
                              float* dk, float* dv) {
    for (int i = 0; i < n_q; ++i) {
        float* dq = s.dq + static_cast<ptrdiff_t>(i / kPanel) * head.D * kPanel + i % kPanel;
        for (int j = 0; j < least(n, keys_seen(head, i0 + i) - j0); ++j) {
            const float p = s.p[j * BackwardScratch::kPairs + i];
            const float ds = s.ds[j * BackwardScratch::kPairs + i];
            for (int d = 0; d < head.D; ++d) {
                dv[j * s.ld + d] += p * s.dout_rows[i * s.ld + d];
                dk[j * s.ld + d] += ds * s.q_rows[i * s.ld + d];
                dq[d * kPanel] += ds * s.k[j * s.ld + d];
            }
        }
    }
}

/// One block of queries against one tile of keys.
inline void backward_tile(const AttentionHead& head, BackwardScratch& s, int i0, int n_q, int j0, bool finite,
                          float* dk, float* dv) {
    const int D = head.D;
    const int n_tile = visible_keys(head, i0, n_q, j0);
    finite &= pack_rows(head.k, j0, n_tile, D, s.k, s.ld);
    pack_rows(head.v, j0, n_tile, D, s.v, s.ld);
    const bool whole = j0 + n_tile <= keys_seen(head, i0);  // every query sees every key

    for (int panel = 0; panel * kPanel < n_q; ++panel) {
        const int i = i0 + panel * kPanel;
        const int n = most(0, visible_keys(head, i, least(kPanel, n_q - panel * kPanel), j0));
        if (n > 0) backward_pairs(head, s, i, panel, n, j0);
        for (int j = n; j < n_tile; ++j)
            for (int x = 0; x < kPanel; x += kLanes) {
                store(s.p + j * BackwardScratch::kPairs + panel * kPanel + x, set(0.0F));
                store(s.ds + j * BackwardScratch::kPairs + panel * kPanel + x, set(0.0F));
            }
    }
    if (!whole && !finite) {
        add_visible_pairs(head, s, i0, n_q, j0, n_tile, dk, dv);
        return;
    }
    const int hidden = head.causal ? j0 - (i0 + head.T_k - head.T_q) : -kKeyTile;
    add_to_keys(s.p, n_tile, hidden, n_q, s.dout_rows, s.ld, dv);
    add_to_keys(s.ds, n_tile, hidden, n_q, s.q_rows, s.ld, dk);
    for (int panel = 0; panel * kPanel < n_q; ++panel) {
        const int n = visible_keys(head, i0 + panel * kPanel, least(kPanel, n_q - panel * kPanel), j0);
        if (n > 0)
            product<kTileVecs>(D, {s.k, 1, s.ld}, s.ds + panel * kPanel, BackwardScratch::kPairs,
                               s.dq + static_cast<ptrdiff_t>(panel) * D * kPanel, kPanel, n, true);
    }
}

/// Packs a block of queries, with delta = rowsum(dO * O), which is rowsum(P * dP) for what softmax's
/// derivative takes off. True if all queries and dO are finite.
inline bool load_queries(const AttentionHead& head, BackwardScratch& s, int i0, int n_q) {
    const int D = head.D;
    bool finite = pack_rows(head.q, i0, n_q, D, s.q_rows, s.ld);
    finite &= pack_rows(head.dout, i0, n_q, D, s.dout_rows, s.ld);
    pack_panels(s.q_rows, s.ld, n_q, D, head.scale * kLog2E, s.q);
    pack_panels(s.dout_rows, s.ld, n_q, D, 1.0F, s.dout);
    for (int i = 0; i < kQueryBlock; ++i) {
        s.lse[i] = i < n_q ? head.lse[i0 + i] * kLog2E : INFINITY;
        s.delta[i] = 0.0F;
        if (i >= n_q) continue;
        const float* out = head.out.data + (i0 + i) * head.out.stride;
        const float* dout = s.dout_rows + static_cast<ptrdiff_t>(i) * s.ld;
        Vec total = set(0.0F);
        int d = 0;
        for (; d + kLanes <= D; d += kLanes) total = fma(load(out + d), load(dout + d), total);
        s.delta[i] = sum(total);
        for (; d < D; ++d) s.delta[i] += out[d] * dout[d];
    }
    return finite;
}

size_t backward_scratch(int, int D) { return BackwardScratch(nullptr, D).arena.used; }

/// dk, then dv, as T_k rows of whole vectors.
size_t kv_sums(int T_k, int D) { return 2 * static_cast<size_t>(T_k) * round_up(D, kLanes); }

void attention_backward(const AttentionHead& head, int first, int step, float* scratch, float* sums) {
    BackwardScratch s(scratch, head.D);
    const int D = head.D;
    float* dk = sums;
    float* dv = sums + static_cast<ptrdiff_t>(head.T_k) * s.ld;
    for (size_t x = 0; x < kv_sums(head.T_k, D); ++x) sums[x] = 0.0F;
    float factors[kPanel];
    for (float& factor : factors) factor = head.scale;

    for (int i0 = first * kQueryBlock; i0 < head.T_q; i0 += step * kQueryBlock) {
        const int n_q = least(kQueryBlock, head.T_q - i0);
        const int n_k = least(head.T_k, keys_seen(head, i0 + n_q - 1));
        const bool finite = load_queries(head, s, i0, n_q);
        for (int x = 0; x < kQueryBlock * D; ++x) s.dq[x] = 0.0F;
        for (int j0 = 0; j0 < n_k; j0 += kKeyTile) {
            const ptrdiff_t at = static_cast<ptrdiff_t>(j0) * s.ld;
            backward_tile(head, s, i0, n_q, j0, finite, dk + at, dv + at);
        }
        for (int i = 0; i < n_q; i += kPanel)
            write_panel(s.dq + static_cast<ptrdiff_t>(i) * D, least(kPanel, n_q - i), D, factors, head.dq,
                        i0 + i);
    }
}

void attention_write_kv(const AttentionHead& head, const float* sums, int n_parts) {
    const int ld = round_up(head.D, kLanes);
    const size_t part = kv_sums(head.T_k, head.D);
    for (int j = 0; j < head.T_k; ++j)
        for (int d = 0; d < head.D; ++d) {
            const float* dk = sums + static_cast<ptrdiff_t>(j) * ld + d;
            const float* dv = dk + static_cast<ptrdiff_t>(head.T_k) * ld;
            float k_total = 0.0F;
            float v_total = 0.0F;
            for (int n = 0; n < n_parts; ++n) {
                k_total += dk[n * part];
                v_total += dv[n * part];
            }
            head.dk.data[j * head.dk.stride + d] = head.scale * k_total;
            head.dv.data[j * head.dv.stride + d] = v_total;
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

/// The kernels of this file's instruction set, for the end of target_<isa>.cpp.
#define MLXGPT_KERNEL_TABLE(name)                                             \
    {name,         kQueryBlock,       forward_scratch,    backward_scratch,   \
     kv_sums,      attention_forward, attention_backward, attention_write_kv, \
     dropout_mask, &op_kernels}
