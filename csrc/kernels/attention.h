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
using mlxgpt::Storage;

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
inline auto typed(Rows rows, int first, F f) {
    const ptrdiff_t at = first * rows.stride;
    if (rows.storage == Storage::kBFloat16) return f(static_cast<BFloat16*>(rows.data) + at);
    if (rows.storage == Storage::kFloat16) return f(static_cast<Float16*>(rows.data) + at);
    return f(static_cast<float*>(rows.data) + at);
}

/// n elements of a row, fewer than a vector has, and zeros behind them.
template <class T>
inline Vec load_part(const T* p, int n) {
    T part[kLanes] = {};
    for (int i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
}

template <class T>
inline void store_part(T* p, Vec x, int n) {
    T part[kLanes];
    store(part, x);
    for (int i = 0; i < n; ++i) p[i] = part[i];
}

/// Copies n rows of D elements to rows of ld floats, filling up with zeros. False if one is NaN or
/// infinite.
inline bool pack_rows(Rows from, int first, int n, int D, float* to, int ld) {
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
inline void write_vector(Rows to, int i, int d, int D, Vec x) {
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
inline void write_panel(const float* panel, int n, int D, const float* factors, Rows to, int first) {
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

/// What a block of queries carries along its keys.
struct ForwardScratch {
    Arena arena;
    PackedKeys keys;
    int ld;
    float* q_rows;            // [kQueryBlock][ld]
    float *q, *out;           // panels of [ld][kPanel]
    float *maximum, *sum;     // [kQueryBlock]; scores are in units of log 2
    float *scores, *factors;  // [kKeyTile][kPanel]

    ForwardScratch(float* base, int T_k, int D) : arena{base}, keys(arena, T_k, D), ld(keys.ld) {
        const size_t block = static_cast<size_t>(kQueryBlock) * ld;
        q_rows = arena.take(block);
        q = arena.take(block);
        out = arena.take(block);
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
    const int n_full = most(0, least(n, seen_by_first - j0));  // keys that all queries see
    Vec now[kTileVecs], shrink[kTileVecs], sums[kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) now[v] = load(maximum + v * kLanes);
    for (int j = 0; j < n_full; ++j)
        for (int v = 0; v < kTileVecs; ++v) now[v] = max(load(scores + j * kPanel + v * kLanes), now[v]);
    for (int j = n_full; j < n; ++j)
        for (int v = 0; v < kTileVecs; ++v) {
            float* score = scores + j * kPanel + v * kLanes;
            store(score, select(visible(seen_by_first, j0 + j, v), load(score), set(-INFINITY)));
            now[v] = max(load(score), now[v]);
        }
    for (int v = 0; v < kTileVecs; ++v) {
        // The maximum starts at -FLT_MAX instead of -inf: a query whose scores are all -inf so far
        // gets exp(-inf + FLT_MAX) = 0 here, not exp(-inf + inf).
        shrink[v] = exp2_nonpositive(load(maximum + v * kLanes) - now[v]);
        sums[v] = load(total + v * kLanes) * shrink[v];
        store(maximum + v * kLanes, now[v]);
    }
    for (int j = 0; j < n; ++j)
        for (int v = 0; v < kTileVecs; ++v) {
            const Vec p = exp2_nonpositive(load(scores + j * kPanel + v * kLanes) - now[v]);
            store(scores + j * kPanel + v * kLanes, p);
            sums[v] = sums[v] + p;
        }
    for (int v = 0; v < kTileVecs; ++v) store(total + v * kLanes, sums[v]);
    for (int d = 0; d < D; ++d)
        for (int v = 0; v < kTileVecs; ++v) {
            float* o = out + d * kPanel + v * kLanes;
            store(o, load(o) * shrink[v]);
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
    const float* k = s.keys.k + static_cast<ptrdiff_t>(j0) * s.ld;
    const float* v = s.keys.v + static_cast<ptrdiff_t>(j0) * s.ld;
    const ptrdiff_t at = static_cast<ptrdiff_t>(panel) * s.ld * kPanel;
    float* out = s.out + at;

    product<kTileVecs>(n, Plain{k, s.ld}, s.q + at, kPanel, s.scores, kPanel, D, false);
    softmax_step(s.scores, n, seen, j0, s.maximum + panel * kPanel, s.sum + panel * kPanel, out, D);
    if (head.dropout > 0.0F) {
        dropout_factors(head, i0, j0, n, s.factors);
        for (int x = 0; x < n * kPanel; x += kLanes)
            store(s.scores + x, load(s.scores + x) * load(s.factors + x));
    }
    if (j0 + n <= seen || s.keys.v_finite[j0 / kKeyTile] != 0.0F)
        product<kTileVecs>(D, Transposed{v, s.ld}, s.scores, kPanel, out, kPanel, n, true);
    else
        add_visible_values(v, s.ld, s.scores, n, seen, j0, out, D);
}

/// A single query, as in decoding with a cache: every key is used once, so nothing is packed, and lanes
/// hold elements of a row. The one query is the last, which sees all keys.
inline void decode(const AttentionHead& head, float* scratch) {
    const int D = head.D;
    const int ld = round_up(D, kLanes);
    Arena arena{scratch};
    float* q = arena.take(ld);
    float* out = arena.take(ld);
    float* scores = arena.take(kKeyTile);
    pack_rows(head.q, 0, 1, D, q, ld);
    for (int d = 0; d < ld; d += kLanes) {
        store(q + d, set(head.scale * kLog2E) * load(q + d));
        store(out + d, set(0.0F));
    }
    float maximum = -FLT_MAX;
    float total = 0.0F;
    for (int j0 = 0; j0 < head.T_k; j0 += kKeyTile) {
        const int n = least(kKeyTile, head.T_k - j0);
        const float before = maximum;
        Vec now = set(maximum);
        typed(head.k, j0, [&](const auto* row) {
            for (int j = 0; j < n; ++j, row += head.k.stride) {
                Vec dot = set(0.0F);
                int d = 0;
                for (; d + kLanes <= D; d += kLanes) dot = fma(load(row + d), load(q + d), dot);
                if (d < D) dot = fma(load_part(row + d, D - d), load(q + d), dot);
                scores[j] = sum(dot);
            }
        });
        for (int j = n; j < round_up(n, kLanes); ++j) scores[j] = -INFINITY;
        for (int j = 0; j < n; j += kLanes) now = max(load(scores + j), now);
        float lanes[kLanes];
        store(lanes, now);
        for (const float lane : lanes) maximum = lane > maximum ? lane : maximum;
        const Vec shrink = exp2_nonpositive(set(before - maximum));
        Vec sums = set(0.0F);
        for (int j = 0; j < n; j += kLanes) {
            const Vec p = exp2_nonpositive(load(scores + j) - set(maximum));
            store(scores + j, p);
            sums = sums + p;
        }
        store(lanes, shrink);
        total = total * lanes[0] + sum(sums);
        typed(head.v, j0, [&](const auto* rows) {
            for (int d = 0; d < D; d += kLanes) {
                Vec o = load(out + d) * shrink;
                const auto* row = rows + d;
                for (int j = 0; j < n; ++j, row += head.v.stride)
                    o = fma(set(scores[j]), d + kLanes <= D ? load(row) : load_part(row, D - d), o);
                store(out + d, o);
            }
        });
    }
    head.lse[0] = kLn2 * (maximum + log2f(total));
    for (int d = 0; d < D; d += kLanes) write_vector(head.out, 0, d, D, load(out + d) * set(1.0F / total));
}

size_t forward_scratch(int T_k, int D) { return ForwardScratch(nullptr, T_k, D).arena.used; }

void attention_forward(const AttentionHead& head, int first, int step, float* scratch) {
    if (head.T_q == 1 && head.dropout == 0.0F) {
        decode(head, scratch);
        return;
    }
    ForwardScratch s(scratch, head.T_k, head.D);
    const int D = head.D;
    for (int i0 = first * kQueryBlock; i0 < head.T_q; i0 += step * kQueryBlock) {
        const int n_q = least(kQueryBlock, head.T_q - i0);
        const int n_k = least(head.T_k, keys_seen(head, i0 + n_q - 1));
        s.keys.extend(head, n_k);
        pack_rows(head.q, i0, n_q, D, s.q_rows, s.ld);
        pack_panels(s.q_rows, s.ld, n_q, head.scale * kLog2E, s.q);
        for (int i = 0; i < kQueryBlock; ++i) {
            s.maximum[i] = -FLT_MAX;
            s.sum[i] = 0.0F;
        }
        for (int x = 0; x < kQueryBlock * s.ld; ++x) s.out[x] = 0.0F;

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
            write_panel(s.out + static_cast<ptrdiff_t>(panel) * s.ld * kPanel, n, D, sum, head.out,
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
    PackedKeys keys;
    int ld;
    float *q_rows, *dout_rows;  // [kQueryBlock][ld]
    float* out_row;             // [ld]
    float *q, *dout, *dq;       // panels of [ld][kPanel]
    float *lse, *delta;         // [kQueryBlock]
    float *p, *ds;              // [kKeyTile][kPairs]
    float* factors;             // [kKeyTile][kPanel]

    BackwardScratch(float* base, int T_k, int D) : arena{base}, keys(arena, T_k, D), ld(keys.ld) {
        const size_t block = static_cast<size_t>(kQueryBlock) * ld;
        q_rows = arena.take(block);
        dout_rows = arena.take(block);
        q = arena.take(block);
        dout = arena.take(block);
        dq = arena.take(block);
        out_row = arena.take(ld);
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
    const ptrdiff_t of_panel = static_cast<ptrdiff_t>(panel) * s.ld * kPanel;
    const ptrdiff_t of_tile = static_cast<ptrdiff_t>(j0) * s.ld;
    product<kTileVecs>(n, Plain{s.keys.k + of_tile, s.ld}, s.q + of_panel, kPanel, p, kPairs, D, false);
    product<kTileVecs>(n, Plain{s.keys.v + of_tile, s.ld}, s.dout + of_panel, kPanel, ds, kPairs, D, false);
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
        const Plain a{w + j * kPairs + i, kPairs};
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
    const float* k = s.keys.k + static_cast<ptrdiff_t>(j0) * s.ld;
    for (int i = 0; i < n_q; ++i) {
        float* dq = s.dq + static_cast<ptrdiff_t>(i / kPanel) * s.ld * kPanel + i % kPanel;
        for (int j = 0; j < least(n, keys_seen(head, i0 + i) - j0); ++j) {
            const float p = s.p[j * BackwardScratch::kPairs + i];
            const float ds = s.ds[j * BackwardScratch::kPairs + i];
            for (int d = 0; d < head.D; ++d) {
                dv[j * s.ld + d] += p * s.dout_rows[i * s.ld + d];
                dk[j * s.ld + d] += ds * s.q_rows[i * s.ld + d];
                dq[d * kPanel] += ds * k[j * s.ld + d];
            }
        }
    }
}

/// One block of queries against one tile of keys.
inline void backward_tile(const AttentionHead& head, BackwardScratch& s, int i0, int n_q, int j0, bool finite,
                          float* dk, float* dv) {
    const int D = head.D;
    const int n_tile = visible_keys(head, i0, n_q, j0);
    const float* k = s.keys.k + static_cast<ptrdiff_t>(j0) * s.ld;
    finite &= s.keys.k_finite[j0 / kKeyTile] != 0.0F;
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
            product<kTileVecs>(D, Transposed{k, s.ld}, s.ds + panel * kPanel, BackwardScratch::kPairs,
                               s.dq + static_cast<ptrdiff_t>(panel) * s.ld * kPanel, kPanel, n, true);
    }
}

/// Packs a block of queries, with delta = rowsum(dO * O), which is rowsum(P * dP) for what softmax's
/// derivative takes off. True if all queries and dO are finite.
inline bool load_queries(const AttentionHead& head, BackwardScratch& s, int i0, int n_q) {
    const int D = head.D;
    bool finite = pack_rows(head.q, i0, n_q, D, s.q_rows, s.ld);
    finite &= pack_rows(head.dout, i0, n_q, D, s.dout_rows, s.ld);
    pack_panels(s.q_rows, s.ld, n_q, head.scale * kLog2E, s.q);
    pack_panels(s.dout_rows, s.ld, n_q, 1.0F, s.dout);
    for (int i = 0; i < kQueryBlock; ++i) {
        s.lse[i] = i < n_q ? head.lse[i0 + i] * kLog2E : INFINITY;
        s.delta[i] = 0.0F;
        if (i >= n_q) continue;
        pack_rows(head.out, i0 + i, 1, D, s.out_row, s.ld);
        Vec total = set(0.0F);
        for (int d = 0; d < s.ld; d += kLanes)
            total = fma(load(s.out_row + d), load(s.dout_rows + static_cast<ptrdiff_t>(i) * s.ld + d), total);
        s.delta[i] = sum(total);
    }
    return finite;
}

size_t backward_scratch(int T_k, int D) { return BackwardScratch(nullptr, T_k, D).arena.used; }

/// dk, then dv, as T_k rows of whole vectors.
size_t kv_sums(int T_k, int D) { return 2 * static_cast<size_t>(T_k) * round_up(D, kLanes); }

void attention_backward(const AttentionHead& head, int first, int step, float* scratch, float* sums) {
    BackwardScratch s(scratch, head.T_k, head.D);
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
        s.keys.extend(head, n_k);
        for (int x = 0; x < kQueryBlock * s.ld; ++x) s.dq[x] = 0.0F;
        for (int j0 = 0; j0 < n_k; j0 += kKeyTile) {
            const ptrdiff_t at = static_cast<ptrdiff_t>(j0) * s.ld;
            backward_tile(head, s, i0, n_q, j0, finite, dk + at, dv + at);
        }
        for (int i = 0; i < n_q; i += kPanel)
            write_panel(s.dq + static_cast<ptrdiff_t>(i) * s.ld, least(kPanel, n_q - i), D, factors, head.dq,
                        i0 + i);
    }
}

void attention_write_kv(const AttentionHead& head, const float* sums, int n_parts) {
    const int ld = round_up(head.D, kLanes);
    const size_t part = kv_sums(head.T_k, head.D);
    for (int j = 0; j < head.T_k; ++j)
        for (int d = 0; d < ld; d += kLanes) {
            const float* dk = sums + static_cast<ptrdiff_t>(j) * ld + d;
            const float* dv = dk + static_cast<ptrdiff_t>(head.T_k) * ld;
            Vec k_total = load(dk);
            Vec v_total = load(dv);
            for (int n = 1; n < n_parts; ++n) {
                k_total = k_total + load(dk + n * part);
                v_total = v_total + load(dv + n * part);
            }
            write_vector(head.dk, j, d, head.D, set(head.scale) * k_total);
            write_vector(head.dv, j, d, head.D, v_total);
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
#define MLXGPT_KERNEL_TABLE(name) \
    {name,                        \
     kQueryBlock,                 \
     forward_scratch,             \
     backward_scratch,            \
     kv_sums,                     \
     attention_forward,           \
     attention_backward,          \
     attention_write_kv,          \
     dropout_mask,                \
     map<exp2_nonpositive>,       \
     map<exp>,                    \
     map<log>,                    \
     map<tanh>,                   \
     map<erf>,                    \
     fma_burst}
