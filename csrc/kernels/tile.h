// Products of small matrices, C += A B with a block of C in registers: the inner loops of attention.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

namespace {

/// A matrix whose elements are broadcast one by one. A(r, k) is data[r * ld + k], or data[k * ld + r] if A is
/// stored transposed.
enum class Order { kPlain, kTransposed };
template <Order order>
struct Broadcast {
    const float* data;
    ptrdiff_t ld;
    const float& at(int r, int k) const {
        return order == Order::kPlain ? data[r * ld + k] : data[k * ld + r];
    }
};
using Plain = Broadcast<Order::kPlain>;
using Transposed = Broadcast<Order::kTransposed>;

/// C[r][v] = sum over k of A(r, k) * B[k][v] for R rows and V vectors of columns, added to C if `add`.
template <int R, int V, Order order>
inline void block_product(Broadcast<order> a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc, int n_k,
                          bool add) {
    Vec sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = add ? load(c + r * ldc + v * kLanes) : set(0.0F);
    const auto step = [&](int k) {
        Vec columns[V];
        for (int v = 0; v < V; ++v) columns[v] = load(b + k * ldb + v * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec x = set(a.at(r, k));
            for (int v = 0; v < V; ++v) sums[r][v] = fma(x, columns[v], sums[r][v]);
        }
    };
    int k = 0;
    for (; k + 4 <= n_k; k += 4) {
        step(k);
        step(k + 1);
        step(k + 2);
        step(k + 3);
    }
    for (; k < n_k; ++k) step(k);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
}

/// A block product of `rows` rows, at most R.
template <int R, int V, Order order>
inline void block_of_rows(int rows, Broadcast<order> a, const float* b, ptrdiff_t ldb, float* c,
                          ptrdiff_t ldc, int n_k, bool add) {
    if constexpr (R > 0) {
        if (rows == R)
            block_product<R, V>(a, b, ldb, c, ldc, n_k, add);
        else
            block_of_rows<R - 1, V>(rows, a, b, ldb, c, ldc, n_k, add);
    }
}

/// C = A B, or C += A B if `add`, for any number of rows and V vectors of columns.
template <int V, Order order>
inline void product(int rows, Broadcast<order> a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc,
                    int n_k, bool add) {
    while (rows > 0) {
        // The last two blocks have about the same number of rows: a block of one or two would have too few
        // sums to hide the latency of a multiply-add.
        const int n = rows >= 2 * kTileRows ? kTileRows : rows <= kTileRows ? rows : (rows + 1) / 2;
        block_of_rows<kTileRows, V>(n, a, b, ldb, c, ldc, n_k, add);
        a.data = &a.at(n, 0);
        c += n * ldc;
        rows -= n;
    }
}

/// The multiply-adds of a block product without loads. Returns the number of floating-point operations.
double fma_burst(int n) {
    constexpr int kSums = kTileRows * kTileVecs;
    Vec sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = set(static_cast<float>(i));
    const Vec x = set(0.999F);
    const Vec y = set(0.001F);
    for (int k = 0; k < n; ++k)
        for (int i = 0; i < kSums; ++i) sums[i] = fma(x, sums[i], y);
    volatile float kept = 0.0F;  // so that the compiler can't leave the loop out
    for (int i = 0; i < kSums; ++i) kept = kept + sum(sums[i]);
    return 2.0 * n * kSums * kLanes;
}

}  // namespace
