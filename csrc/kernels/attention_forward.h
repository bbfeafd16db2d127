// Causal attention of one head, forward.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include <float.h>
#include <math.h>

#include "kernels/attention_kernel.h"

namespace {

/// The memory of one block of queries: what it carries from tile to tile, and its work on one tile.
struct ForwardScratch {
    Arena arena;
    PackedKeys keys;
    int ld;
    float* q_rows;            // [kQueryBlock][ld]
    float *q, *out;           // panels of [ld][kPanel]
    float *maximum, *sum;     // [kQueryBlock]; scores are multiplied by log2 e, so that exp is 2^x
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

/// Replaces a panel's scores [n][kPanel] by exp(score - maximum), updates the panel's maximum and sum, and
/// rescales its outputs to the new maximum.
inline void softmax_step(float* scores, int n, int seen_by_first, int j0, float* maximum, float* total,
                         float* out, int D) {
    const int n_full = max(0, min(n, seen_by_first - j0));  // keys that every query sees
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
        // The maximum starts at -FLT_MAX instead of -inf: if all scores of a query are -inf so far, this is
        // exp(-inf + FLT_MAX) = 0 and not exp(-inf + inf) = NaN.
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

/// out[d][lane] += v[j][d] * p[j][lane] for each visible pair of query and key. In a tile on the diagonal,
/// the fast product adds 0 * v[j][d] for a key j that the query does not see, which is NaN if v[j][d] is not
/// finite.
inline void add_visible_values(const float* v, int ld, const float* p, int n, int seen_by_first, int j0,
                               float* out, int D) {
    for (int j = 0; j < n; ++j)
        for (int lane = max(0, j0 + j + 1 - seen_by_first); lane < kPanel; ++lane)
            for (int d = 0; d < D; ++d)
                out[d * kPanel + lane] += v[static_cast<ptrdiff_t>(j) * ld + d] * p[j * kPanel + lane];
}

/// Adds what one tile of keys contributes to one panel of queries.
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

/// Attention of a single query, as in decoding with a cache. Every key is used once, so nothing is packed,
/// and lanes hold elements of a row. The query is the last one, which sees all keys.
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
        const int n = min(kKeyTile, head.T_k - j0);
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

void copy_rows(StoredRows from, int n, int D, StoredRows to) {
    typed(from, 0, [=](const auto* row) {
        for (int i = 0; i < n; ++i, row += from.stride)
            for (int d = 0; d < D; d += kLanes)
                write_vector(to, i, d, D, d + kLanes <= D ? load(row + d) : load_part(row + d, D - d));
    });
}

size_t attention_forward_scratch(int T_k, int D) { return ForwardScratch(nullptr, T_k, D).arena.used; }

void attention_forward(const AttentionHead& head, int first, int step, float* scratch) {
    if (head.T_q == 1 && head.dropout == 0.0F) {
        decode(head, scratch);
        return;
    }
    ForwardScratch s(scratch, head.T_k, head.D);
    const int D = head.D;
    for (int i0 = first * kQueryBlock; i0 < head.T_q; i0 += step * kQueryBlock) {
        const int n_q = min(kQueryBlock, head.T_q - i0);
        const int n_k = min(head.T_k, keys_seen(head, i0 + n_q - 1));
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
                forward_panel(head, s, i0 + panel * kPanel, panel, min(kPanel, n_q - panel * kPanel), j0);

        for (int panel = 0; panel * kPanel < n_q; ++panel) {
            const int n = min(kPanel, n_q - panel * kPanel);
            float* sum = s.sum + panel * kPanel;
            float lse[kPanel];
            for (int lane = 0; lane < kPanel; lane += kLanes) {
                const Vec total = load(sum + lane);
                store(lse + lane, fma(load(s.maximum + panel * kPanel + lane), set(kLn2), log(total)));
                store(sum + lane, set(1.0F) / total);
            }
            for (int i = 0; i < n; ++i) head.lse[i0 + panel * kPanel + i] = lse[i];
            write_panel(s.out + static_cast<ptrdiff_t>(panel) * s.ld * kPanel, n, D, sum, head.out,
                        i0 + panel * kPanel);
        }
    }
}

}  // namespace
