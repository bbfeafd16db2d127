#include "ops/copy.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "runtime/parallel.h"
#include "runtime/split.h"

namespace mlxgpt {
namespace {

// Elements are copied as bits, so that NaN and infinity pass unchanged. `kExponent` masks the exponent, all
// ones if a value is not finite; `widened` gives the bits of the same value in float32.
struct Float32Bits {
    using Bits = uint32_t;
    static constexpr Bits kExponent = 0x7F800000;
    static uint32_t widened(Bits bits) { return bits; }
};

struct BFloat16Bits {
    using Bits = uint16_t;
    static constexpr Bits kExponent = 0x7F80;
    static uint32_t widened(Bits bits) { return static_cast<uint32_t>(bits) << 16; }
};

struct Float16Bits {
    using Bits = uint16_t;
    static constexpr Bits kExponent = 0x7C00;
    // Exponent and fraction, moved to their places in float32, mean 2^-112 times the value; so for subnormal
    // numbers too.
    static uint32_t widened(Bits bits) {
        uint32_t wide = (bits & 0x7FFFU) << 13;
        float value;
        std::memcpy(&value, &wide, 4);
        value *= 0x1p112F;
        std::memcpy(&wide, &value, 4);
        const uint32_t infinite = (bits & kExponent) == kExponent ? 0x7F800000U : 0U;
        return wide | infinite | (bits & 0x8000U) << 16;
    }
};

/// Copies n adjacent elements from x, which may be unaligned, to out. Returns whether one is not finite.
template <class From, class To>
bool copy_run(const char* x, ptrdiff_t n, To* out) {
    using Bits = typename From::Bits;
    Bits faults = 0;
    for (ptrdiff_t i = 0; i < n; ++i) {
        Bits bits;
        std::memcpy(&bits, x + i * static_cast<ptrdiff_t>(sizeof bits), sizeof bits);
        faults |= static_cast<Bits>((bits & From::kExponent) == From::kExponent);
        if constexpr (sizeof(To) == sizeof(Bits))
            out[i] = bits;
        else
            out[i] = From::widened(bits);
    }
    return faults != 0;
}

// A tile of 64 x 64 floats is 16 KB, half of L1. Rows of a power of two would fall on the same cache sets.
constexpr ptrdiff_t kTile = 64, kTilePadded = kTile + 4;

/// out[i][j] = tile[j][i], in blocks of 4 x 4, which compilers transpose in registers.
template <class To>
void transpose_tile(const To (*tile)[kTilePadded], ptrdiff_t n_rows, ptrdiff_t n_columns, To* out,
                    ptrdiff_t stride) {
    constexpr ptrdiff_t kBlock = 4;
    ptrdiff_t i = 0;
    for (; i + kBlock <= n_rows; i += kBlock) {
        ptrdiff_t j = 0;
        for (; j + kBlock <= n_columns; j += kBlock) {
            To block[kBlock][kBlock];
            for (ptrdiff_t a = 0; a < kBlock; ++a)
                for (ptrdiff_t b = 0; b < kBlock; ++b) block[b][a] = tile[j + a][i + b];
            for (ptrdiff_t b = 0; b < kBlock; ++b)
                std::memcpy(out + (i + b) * stride + j, block[b], sizeof block[b]);
        }
        for (; j < n_columns; ++j)
            for (ptrdiff_t b = 0; b < kBlock; ++b) out[(i + b) * stride + j] = tile[j][i + b];
    }
    for (; i < n_rows; ++i)
        for (ptrdiff_t j = 0; j < n_columns; ++j) out[i * stride + j] = tile[j][i];
}

template <class From, class To>
bool copy_transposed(const CopyCall& call, Range rows) {
    To tile[kTile][kTilePadded];
    bool faults = false;
    for (ptrdiff_t first = rows.begin; first < rows.begin + rows.size; first += kTile) {
        const ptrdiff_t n_rows = std::min(kTile, rows.begin + rows.size - first);
        for (ptrdiff_t column = 0; column < call.columns; column += kTile) {
            const ptrdiff_t n_columns = std::min(kTile, call.columns - column);
            const char* x = call.x + first * call.x_row + column * call.x_column;
            for (ptrdiff_t j = 0; j < n_columns; ++j)
                faults |= copy_run<From>(x + j * call.x_column, n_rows, tile[j]);
            To* out = static_cast<To*>(call.out) + first * call.columns + column;
            transpose_tile(tile, n_rows, n_columns, out, call.columns);
        }
    }
    return faults;
}

template <class From, class To>
bool copy_rows(const CopyCall& call, Range rows) {
    constexpr ptrdiff_t kSize = sizeof(typename From::Bits);
    if (call.x_column != kSize && call.columns > 1) return copy_transposed<From, To>(call, rows);
    bool faults = false;
    for (ptrdiff_t i = rows.begin; i < rows.begin + rows.size; ++i)
        faults |= copy_run<From>(call.x + i * call.x_row, call.columns,
                                 static_cast<To*>(call.out) + i * call.columns);
    return faults;
}

using CopyRows = bool(const CopyCall&, Range);

CopyRows* copy_rows_of(const CopyCall& call) {
    const bool widen = call.x_storage != call.out_storage;
    switch (call.x_storage) {
        case Storage::kBFloat16:
            return widen ? copy_rows<BFloat16Bits, uint32_t> : copy_rows<BFloat16Bits, uint16_t>;
        case Storage::kFloat16:
            return widen ? copy_rows<Float16Bits, uint32_t> : copy_rows<Float16Bits, uint16_t>;
        default:
            return copy_rows<Float32Bits, uint32_t>;
    }
}

// Writing to fresh memory causes a page fault for every 4 KB, which takes longer than the copy; one call for
// all pages takes about half as long. (Huge pages are faster if the kernel has some ready, and far slower if
// it has to make them first.)
void fault_in([[maybe_unused]] const void* begin, [[maybe_unused]] ptrdiff_t bytes) {
#if defined(MADV_POPULATE_WRITE)
    constexpr ptrdiff_t kWorthIt = 65536;
    if (bytes < kWorthIt) return;
    static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
    // If the kernel refuses, the pages are faulted in one by one, as they would be without this call.
    madvise(reinterpret_cast<void*>(first), end - first, MADV_POPULATE_WRITE);
#endif
}

}  // namespace

bool copy(const CopyCall& call) {
    const ptrdiff_t n = call.rows * call.columns;
    const ptrdiff_t row_bytes = call.columns * (call.out_storage == Storage::kFloat32 ? 4 : 2);
    CopyRows* const copy_rows = copy_rows_of(call);
    // A task faults its memory in one band of rows at a time, so that the band is still in the cache for the
    // copy.
    const ptrdiff_t band = kTile;
    const int n_parts = n_tasks(static_cast<double>(n), kElementsPerTask);
    std::atomic<bool> faults{false};
    parallel_for(n_parts, [&](int task, int) {
        const Range part = part_of(call.rows, task, n_parts, kTile);
        for (ptrdiff_t first = part.begin; first < part.begin + part.size; first += band) {
            const Range rows{first, std::min(band, part.begin + part.size - first)};
            fault_in(static_cast<const char*>(call.out) + first * row_bytes, rows.size * row_bytes);
            if (copy_rows(call, rows)) faults.store(true, std::memory_order_relaxed);
        }
    });
    return !faults.load();
}

}  // namespace mlxgpt
