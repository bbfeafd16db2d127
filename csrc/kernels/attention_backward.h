// Causal attention of one head, backward.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include <math.h>

#include "kernels/attention_kernel.h"

namespace {

/// The memory of one block of queries. A row of `p` and `ds` holds all queries of the block, and 16 more
/// floats, so that rows do not fall on the same cache sets.
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

/// Computes one panel's probabilities in a tile of n keys, P^T = exp(K Q^T - lse), and the gradients of its
/// scores, dS^T = P^T * (factors * (V dO^T) - delta). Stores dS^T, and factors * P^T, which multiplied the
/// values.
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

/// sums[j][d] += the sum over i of w[j][i] * rows[i][d]: what a block of n_q queries contributes to a tile of
/// n keys. Key j is hidden from the queries below j + hidden; a register block of keys skips those that its
/// first key is hidden from.
inline void add_to_keys(const float* w, int n, int hidden, int n_q, const float* rows, int ld, float* sums) {
    constexpr int kPairs = BackwardScratch::kPairs;
    for (int j = 0; j < n; j += kTileRows) {
        const int n_rows = min(kTileRows, n - j);
        const int i = max(0, j + hidden);  // the first query that sees key j
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

/// Adds to dq, dk and dv for a tile on the diagonal, for each visible pair of query and key: for inputs that
/// are not finite, for the reason that add_visible_values gives.
inline void add_visible_pairs(const AttentionHead& head, BackwardScratch& s, int i0, int n_q, int j0, int n,
                              float* dk, float* dv) {
    const float* k = s.keys.k + static_cast<ptrdiff_t>(j0) * s.ld;
    for (int i = 0; i < n_q; ++i) {
        float* dq = s.dq + static_cast<ptrdiff_t>(i / kPanel) * s.ld * kPanel + i % kPanel;
        for (int j = 0; j < min(n, keys_seen(head, i0 + i) - j0); ++j) {
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

/// Adds what one block of queries and one tile of keys contribute to dq, dk and dv.
inline void backward_tile(const AttentionHead& head, BackwardScratch& s, int i0, int n_q, int j0, bool finite,
                          float* dk, float* dv) {
    const int D = head.D;
    const int n_tile = visible_keys(head, i0, n_q, j0);
    const float* k = s.keys.k + static_cast<ptrdiff_t>(j0) * s.ld;
    finite &= s.keys.k_finite[j0 / kKeyTile] != 0.0F;
    const bool whole = j0 + n_tile <= keys_seen(head, i0);  // every query sees every key

    for (int panel = 0; panel * kPanel < n_q; ++panel) {
        const int i = i0 + panel * kPanel;
        const int n = max(0, visible_keys(head, i, min(kPanel, n_q - panel * kPanel), j0));
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
        const int n = visible_keys(head, i0 + panel * kPanel, min(kPanel, n_q - panel * kPanel), j0);
        if (n > 0)
            product<kTileVecs>(D, Transposed{k, s.ld}, s.ds + panel * kPanel, BackwardScratch::kPairs,
                               s.dq + static_cast<ptrdiff_t>(panel) * s.ld * kPanel, kPanel, n, true);
    }
}

/// Packs a block of queries and dO, and computes delta = rowsum(dO * O). That equals rowsum(P * dP), which
/// the derivative of softmax subtracts from dP. Returns whether all queries and dO are finite.
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

size_t attention_backward_scratch(int T_k, int D) { return BackwardScratch(nullptr, T_k, D).arena.used; }

/// The sums are dk, then dv, each T_k rows of whole vectors.
size_t attention_kv_sums(int T_k, int D) { return 2 * static_cast<size_t>(T_k) * round_up(D, kLanes); }

void attention_backward(const AttentionHead& head, int first, int step, float* scratch, float* sums) {
    BackwardScratch s(scratch, head.T_k, head.D);
    const int D = head.D;
    float* dk = sums;
    float* dv = sums + static_cast<ptrdiff_t>(head.T_k) * s.ld;
    for (size_t x = 0; x < attention_kv_sums(head.T_k, D); ++x) sums[x] = 0.0F;
    float factors[kPanel];
    for (float& factor : factors) factor = head.scale;

    for (int i0 = first * kQueryBlock; i0 < head.T_q; i0 += step * kQueryBlock) {
        const int n_q = min(kQueryBlock, head.T_q - i0);
        const int n_k = min(head.T_k, keys_seen(head, i0 + n_q - 1));
        const bool finite = load_queries(head, s, i0, n_q);
        s.keys.extend(head, n_k);
        for (int x = 0; x < kQueryBlock * s.ld; ++x) s.dq[x] = 0.0F;
        for (int j0 = 0; j0 < n_k; j0 += kKeyTile) {
            const ptrdiff_t at = static_cast<ptrdiff_t>(j0) * s.ld;
            backward_tile(head, s, i0, n_q, j0, finite, dk + at, dv + at);
        }
        for (int i = 0; i < n_q; i += kPanel)
            write_panel(s.dq + static_cast<ptrdiff_t>(i) * s.ld, min(kPanel, n_q - i), D, factors, head.dq,
                        i0 + i);
    }
}

void attention_write_kv(const AttentionHead& head, const float* sums, int n_parts) {
    const int ld = round_up(head.D, kLanes);
    const size_t part = attention_kv_sums(head.T_k, head.D);
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

}  // namespace
