// Products of small matrices, the inner loops of attention: C += A B with a block of C in registers.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

namespace {

/// A matrix whose elements are broadcast: element (r, k) is data[r * row + k * col].
struct Broadcast {
    const float* data;
    ptrdiff_t row, col;
};

/// C[r][v] (+)= sum over k of A(r, k) * B[k][v], for R rows and V vectors of columns.
template <int R, int V>
inline void block_product(Broadcast a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc, int n_k,
                          bool add) {
    Vec sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = add ? load(c + r * ldc + v * kLanes) : set(0.0F);
    for (int k = 0; k < n_k; ++k) {
        Vec columns[V];
        for (int v = 0; v < V; ++v) columns[v] = load(b + k * ldb + v * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec x = set(a.data[r * a.row + k * a.col]);
            for (int v = 0; v < V; ++v) sums[r][v] = fma(x, columns[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
}

/// The last rows, fewer than a block has.
template <int R, int V>
inline void last_rows(int rows, Broadcast a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc, int n_k,
                      bool add) {
    if constexpr (R > 0) {
        if (rows == R)
            block_product<R, V>(a, b, ldb, c, ldc, n_k, add);
        else
            last_rows<R - 1, V>(rows, a, b, ldb, c, ldc, n_k, add);
    }
}

/// C (+)= A B for any number of rows and V vectors of columns.
template <int V>
inline void product(int rows, Broadcast a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc, int n_k,
                    bool add) {
    for (; rows >= kTileRows; rows -= kTileRows) {
        block_product<kTileRows, V>(a, b, ldb, c, ldc, n_k, add);
        a.data += kTileRows * a.row;
        c += kTileRows * ldc;
    }
    last_rows<kTileRows - 1, V>(rows, a, b, ldb, c, ldc, n_k, add);
}

}  // namespace
