// Tests without Python: the kernels of every instruction set that this processor runs, against double
// precision, and the thread pool, from several threads. For cross-compiled builds and sanitizers;
// scripts/check_targets.sh builds and runs it. With the argument `threads` it runs only the tests of several
// threads, with `quick` it tests mathematical functions at fewer points. Prints a line for each fault; the
// exit status is 1 if there is one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ops/attention.h"
#include "ops/copy.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "tests/testing.h"

using namespace mlxgpt;

namespace {

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// ---- the table ----

// Every member is a pointer, or one of two ints that fill a word together.
void check_table(const Kernels& isa) {
    uintptr_t words[sizeof isa / sizeof(uintptr_t)];
    static_assert(sizeof words == sizeof isa, "the table is whole words");
    std::memcpy(words, &isa, sizeof isa);
    for (size_t i = 0; i < sizeof words / sizeof *words; ++i)
        expect(words[i] != 0, "%s: member %zu of the table of kernels is null: fill_table.h forgets it",
               isa.name, i);
}

// ---- vector mathematics ----

// The error of a result in ulp, units in the last place of the exact result as a float32.
double ulps(float result, double exact) {
    if (std::isnan(exact)) return std::isnan(result) ? 0 : 1e9;
    if (std::isnan(result)) return 1e9;
    constexpr double kLargest = std::numeric_limits<float>::max();
    if (std::fabs(exact) > kLargest) exact = std::copysign(kLargest * (1 + 0x1p-24), exact);
    if (std::isinf(result)) result = std::copysign(1.0F, result), exact *= 0x1p-128;
    const int exponent = std::max(std::ilogb(exact == 0 ? 1e-300 : exact), -126);
    return std::fabs(result - exact) / std::ldexp(1.0, exponent - 23);
}

uint32_t step = 1021;  // functions are tested at every multiple of this prime, taken as the bits of a float32

void check_function(const Kernels& isa, const char* name, Kernels::Function* function,
                    double (*exact)(double), double bound,
                    float largest = std::numeric_limits<float>::infinity()) {
    double worst = 0;
    float worst_at = 0;
    std::vector<float> x, y;
    for (uint64_t bits = 0; bits <= 0xFFFFFFFF; bits += step) {
        x.push_back(from_bits(static_cast<uint32_t>(bits)));
        if (x.size() < 4099 && bits + step <= 0xFFFFFFFF) continue;
        for (const uint32_t corner :
             {0U, 1U, 0x80000000U, 0x80000001U, 0x7F800000U, 0xFF800000U, 0x7FC00000U})
            x.push_back(from_bits(corner));
        y.resize(x.size());
        function(x.data(), y.data(), x.size());
        for (size_t i = 0; i < x.size(); ++i) {
            if (x[i] > largest) continue;
            const double off = ulps(y[i], exact(x[i]));
            if (off > worst) worst = off, worst_at = x[i];
        }
        x.clear();
    }
    std::printf("  %-8s %.2f ulp, worst at %.9g\n", name, worst, worst_at);
    expect(worst <= bound, "%s: %s is off by %.2f ulp at %.9g, expected %.2f at most", isa.name, name, worst,
           worst_at, bound);
}

// exp2_nonpositive gives 0 where the result would be smaller than every normal number.
double exact_exp2_nonpositive(double x) { return x < -126 ? 0 : std::exp2(x); }

void check_mathematics(const Kernels& isa) {
    check_function(isa, "exp2", isa.exp2_nonpositive, exact_exp2_nonpositive, 1.2, 0.0F);
    check_function(isa, "exp", isa.exp, [](double x) { return std::exp(x); }, 1.1);
    check_function(isa, "log", isa.log, [](double x) { return std::log(x); }, 1.1);
    check_function(isa, "tanh", isa.tanh, [](double x) { return std::tanh(x); }, 2.0);
    check_function(isa, "erf", isa.erf, [](double x) { return std::erf(x); }, 1.5);
}

// ---- attention ----

/// One head in memory of its own. In each array, rows have gaps, filled with a known byte.
struct Head {
    static constexpr int kGap = 3;
    AttentionHead head;
    int size, n_q, n_k;
    std::vector<std::vector<unsigned char>> memory;
    std::vector<float> lse;

    Head(int T_q, int T_k, int D, Storage storage, bool causal, float dropout)
        : size(storage == Storage::kFloat32 ? 4 : 2), n_q(T_q), n_k(T_k), lse(T_q) {
        head.T_q = T_q;
        head.T_k = T_k;
        head.D = D;
        head.scale = 1 / std::sqrt(static_cast<float>(D));
        head.causal = causal;
        head.dropout = dropout;
        head.seed = 0x123456789ABCDEFU;
        head.batch = 3;
        head.head = 5;
        head.lse = lse.data();
        for (StoredRows* rows : {&head.q, &head.out, &head.dout, &head.dq}) make(*rows, T_q, storage);
        for (StoredRows* rows : {&head.k, &head.v, &head.dk, &head.dv}) make(*rows, T_k, storage);
        std::mt19937 random(T_q * 1000 + T_k * 10 + D);
        std::normal_distribution<float> normal;
        for (StoredRows* rows : {&head.q, &head.dout, &head.k, &head.v})
            for (int i = 0; i < (rows == &head.q || rows == &head.dout ? T_q : T_k); ++i)
                for (int d = 0; d < D; ++d) set(*rows, i, d, normal(random));
    }
    void make(StoredRows& rows, int n, Storage storage) {
        rows.stride = head.D + kGap;
        rows.storage = storage;
        memory.emplace_back(static_cast<size_t>(n) * rows.stride * size, 0xA5);
        rows.data = memory.back().data();
    }
    // Rounds towards zero: kernel and reference only need the same values, not the nearest.
    void set(StoredRows& rows, int i, int d, float x) {
        unsigned char* at = static_cast<unsigned char*>(rows.data) + (i * rows.stride + d) * size;
        uint32_t bits;
        if (rows.storage == Storage::kFloat16) {
            x = std::copysign(std::min(std::fabs(x) + 0.001F, 4.0F), x);  // no subnormal halves
            std::memcpy(&bits, &x, 4);
            bits = (bits >> 16 & 0x8000) | ((bits & 0x7FFFFFFF) - (112U << 23)) >> 13;
        } else {
            std::memcpy(&bits, &x, 4);
            if (rows.storage == Storage::kBFloat16) bits >>= 16;
        }
        std::memcpy(at, &bits, size);
    }
    double get(const StoredRows& rows, int i, int d) const {
        const unsigned char* at = static_cast<const unsigned char*>(rows.data) + (i * rows.stride + d) * size;
        uint16_t half;
        std::memcpy(&half, at, 2);
        if (rows.storage == Storage::kBFloat16) return from_bits(static_cast<uint32_t>(half) << 16);
        if (rows.storage == Storage::kFloat16)
            return from_bits(static_cast<uint32_t>(half & 0x7FFF) << 13 | static_cast<uint32_t>(half & 0x8000)
                                                                              << 16) *
                   0x1p112;
        float x;
        std::memcpy(&x, at, 4);
        return x;
    }
    bool gaps_untouched() const {
        for (const auto& array : memory)
            for (size_t x = 0; x < array.size(); ++x)
                if (static_cast<int>(x / size % (head.D + kGap)) >= head.D && array[x] != 0xA5) return false;
        return true;
    }
};

void run(const Kernels& isa, const AttentionHead& head, int parts) {
    std::vector<float> memory(isa.attention_forward_scratch(head.T_k, head.D) +
                              isa.attention_backward_scratch(head.T_k, head.D) + 16);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    float* scratch = memory.data() + (64 - address % 64) % 64 / 4;
    std::vector<float> sums(isa.attention_kv_sums(head.T_k, head.D) * parts);
    for (int part = 0; part < parts; ++part) {
        isa.attention_forward(head, part, parts, scratch);
        isa.attention_backward(head, part, parts, scratch,
                               sums.data() + isa.attention_kv_sums(head.T_k, head.D) * part);
    }
    isa.attention_write_kv(head, sums.data(), parts);
}

void check_attention(const Kernels& isa, int T_q, int T_k, int D, Storage storage, bool causal, float dropout,
                     int parts) {
    Head h(T_q, T_k, D, storage, causal, dropout);
    const AttentionHead& head = h.head;
    std::vector<float> factors(static_cast<size_t>(T_q) * T_k, 1.0F);
    if (dropout > 0) isa.dropout_mask(head, factors.data());
    run(isa, head, parts);

    // The definition, in double.
    std::vector<double> out(T_q * D), dq(T_q * D), dk(T_k * D), dv(T_k * D);
    double lse_off = 0;
    for (int i = 0; i < T_q; ++i) {
        const int n = causal ? i + 1 + T_k - T_q : T_k;
        std::vector<double> p(n), dp(n);
        double sum = 0, delta = 0;
        for (int j = 0; j < n; ++j) {
            double score = 0;
            for (int d = 0; d < D; ++d) score += h.get(head.q, i, d) * h.get(head.k, j, d);
            sum += p[j] = std::exp(score * head.scale);
        }
        for (int j = 0; j < n; ++j) {
            p[j] /= sum;
            const double factor = factors[static_cast<size_t>(i) * T_k + j];
            for (int d = 0; d < D; ++d) {
                out[i * D + d] += p[j] * factor * h.get(head.v, j, d);
                dv[j * D + d] += p[j] * factor * h.get(head.dout, i, d);
                dp[j] += factor * h.get(head.v, j, d) * h.get(head.dout, i, d);
            }
            delta += p[j] * dp[j];
        }
        for (int j = 0; j < n; ++j)
            for (int d = 0; d < D; ++d) {
                const double ds = head.scale * p[j] * (dp[j] - delta);
                dq[i * D + d] += ds * h.get(head.k, j, d);
                dk[j * D + d] += ds * h.get(head.q, i, d);
            }
        lse_off = std::max(lse_off, std::fabs(head.lse[i] - std::log(sum)));
    }
    const auto off = [&](const StoredRows& rows, const std::vector<double>& exact, int n) {
        double worst = 0, largest = 1;
        for (int i = 0; i < n; ++i)
            for (int d = 0; d < D; ++d) {
                worst = std::max(worst, std::fabs(h.get(rows, i, d) - exact[i * D + d]));
                largest = std::max(largest, std::fabs(exact[i * D + d]));
                if (std::isnan(h.get(rows, i, d))) worst = 1e9;
            }
        return worst / largest;
    };
    const double bound = storage == Storage::kFloat32 ? 1e-5 : storage == Storage::kFloat16 ? 2e-3 : 2e-2;
    const double worst = std::max({lse_off, off(head.out, out, T_q), off(head.dq, dq, T_q),
                                   off(head.dk, dk, T_k), off(head.dv, dv, T_k)});
    expect(worst < bound,
           "%s: attention T_q %d, T_k %d, D %d, storage %d, causal %d, dropout %g, %d parts is off by %g",
           isa.name, T_q, T_k, D, static_cast<int>(storage), causal, dropout, parts, worst);
    expect(h.gaps_untouched(), "%s: attention T_q %d, T_k %d, D %d wrote between rows", isa.name, T_q, T_k,
           D);
}

void check_attention(const Kernels& isa) {
    for (const int T : {1, 2, 7, 16, 17, 63, 127, 128, 129, 161})
        for (const int D : {1, 5, 16, 64, 80}) check_attention(isa, T, T, D, Storage::kFloat32, true, 0, 1);
    for (const int D : {96, 128, 255, 256}) check_attention(isa, 20, 20, D, Storage::kFloat32, true, 0, 1);
    for (const auto& [T_q, T_k] : {std::pair{1, 140}, {5, 131}, {130, 300}})
        for (const bool causal : {true, false})
            check_attention(isa, T_q, T_k, 33, Storage::kFloat32, causal, 0.2F, 1);
    for (const int T_k : {1, 17, 300})  // a single query has its own code
        for (const int D : {1, 33, 64})
            for (const Storage storage : {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16})
                check_attention(isa, 1, T_k, D, storage, true, 0, 1);
    for (const Storage storage : {Storage::kBFloat16, Storage::kFloat16})
        for (const int D : {3, 64}) check_attention(isa, 140, 140, D, storage, true, 0.1F, 1);
    for (const int parts : {2, 3}) check_attention(isa, 400, 400, 16, Storage::kFloat32, true, 0, parts);
}

void check_nan(const Kernels& isa) {
    Head h(140, 140, 8, Storage::kFloat32, true, 0);
    h.set(h.head.v, 70, 2, NAN);
    h.set(h.head.k, 100, 0, INFINITY);
    run(isa, h.head, 1);
    for (int i = 0; i < 100; ++i)
        for (int d = 0; d < 8; ++d)
            expect(std::isnan(h.get(h.head.out, i, d)) == (i >= 70 && d == 2),
                   "%s: NaN in v reached out[%d][%d]", isa.name, i, d);
}

void check_dropout(const Kernels& isa) {
    Head h(37, 75, 1, Storage::kFloat32, true, 0.4F);
    std::vector<float> expected(37 * 75), found(37 * 75);
    kernels_scalar.dropout_mask(h.head, expected.data());
    isa.dropout_mask(h.head, found.data());
    expect(expected == found, "%s: the dropout mask differs from the scalar one", isa.name);
}

// ---- layers, loss and optimizer ----

/// The results of all kernels of an instruction set but attention's on the same random inputs, one array
/// after the other. Rows have gaps, and lengths are no multiple of any vector's length.
std::vector<float> results_of_layers(const Kernels& isa) {
    constexpr int kRows = 3, kGap = 5;
    std::vector<float> results;
    for (const int n : {1, 7, 16, 37, 130, 1111}) {
        const int stride = n + kGap;
        std::mt19937 random(n);
        std::normal_distribution<float> normal(0, 2);
        const auto array = [&](int rows) {
            std::vector<float> x(static_cast<size_t>(rows) * stride);
            for (float& value : x) value = normal(random);
            return x;
        };
        const auto keep = [&](const std::vector<float>& x) {
            results.insert(results.end(), x.begin(), x.end());
        };
        std::vector<float> x = array(kRows), y = array(kRows), z = array(kRows), weight = array(1),
                           bias = array(1), mean(kRows), rstd(kRows), sums(stride), more(stride);
        const auto rows = [&](std::vector<float>& a) { return Rows{a.data(), stride}; };

        isa.add_bias(rows(x), kRows, n, bias.data(), rows(y));
        keep(x);
        for (int i = 0; i < isa.n_activations; ++i) {
            isa.activations[i].forward(rows(x), kRows, n, bias.data(), rows(z));
            keep(z);
            isa.activations[i].backward(rows(x), kRows, n, rows(y), rows(z));
            keep(y);
            keep(z);
        }
        isa.add_columns(rows(y), kRows, n, sums.data());
        isa.add(weight.data(), n, sums.data());
        keep(sums);
        isa.layer_norm_forward(x.data(), kRows, n, weight.data(), bias.data(), 1e-5F, y.data(), mean.data(),
                               rstd.data());
        for (std::vector<float>* a : {&y, &mean}) keep(*a);
        if (n > 1) {  // a single number has no variance, and rstd magnifies all rounding errors
            keep(rstd);
            isa.layer_norm_backward(z.data(), x.data(), kRows, n, weight.data(), mean.data(), rstd.data(),
                                    y.data(), true, sums.data(), more.data());
            for (std::vector<float>* a : {&y, &sums, &more}) keep(*a);
        }
        const double loss = isa.cross_entropy(x.data(), n, n / 2, 0.5F);
        keep(x);
        const double norm = isa.squares(z.data(), n);
        results.insert(results.end(), {static_cast<float>(loss), static_cast<float>(norm)});
        std::vector<float> m = array(1), v(stride, 0.3F), dropped(stride);
        isa.adamw(weight.data(), bias.data(), m.data(), v.data(), n, 0.99F,
                  {0.5F, 1e-3F, 0.9F, 0.99F, 1e-8F, 2.0F, 3.0F});
        for (std::vector<float>* a : {&weight, &m, &v}) keep(*a);
        isa.dropout(z.data(), bias.data(), 0, n, 0.3F, 0x123456789ABCDEFU, dropped.data());
        keep(dropped);
    }
    return results;
}

/// Compares with the scalar kernels. The Python tests compare with the definitions.
void check_layers(const Kernels& isa) {
    const std::vector<float> expected = results_of_layers(kernels_scalar);
    const std::vector<float> found = results_of_layers(isa);
    for (size_t i = 0; i < expected.size(); ++i)
        expect(std::fabs(found[i] - expected[i]) <= 2e-5F * (1 + std::fabs(expected[i])),
               "%s: result %zu of the layers is %.9g, expected %.9g", isa.name, i, found[i], expected[i]);
}

/// Logits so large that their exponentials overflow, infinite ones, and NaN.
void check_extreme_logits(const Kernels& isa) {
    const auto loss_of = [&](std::vector<float> logits, int target) {
        const double loss = isa.cross_entropy(logits.data(), static_cast<int>(logits.size()), target, 1.0F);
        for (const float gradient : logits)
            expect(std::isfinite(gradient) == std::isfinite(loss),
                   "%s: cross entropy: the loss is %g, a gradient %g", isa.name, loss, gradient);
        return loss;
    };
    expect(loss_of({1e4F, -1e4F, 0}, 0) == 0, "%s: cross entropy: large logits", isa.name);
    expect(loss_of({3e38F, -3e38F, 0}, 0) == 0, "%s: cross entropy: logits that cannot be larger", isa.name);
    expect(std::fabs(loss_of({-INFINITY, 0, 1}, 2) - std::log1p(std::exp(-1.0))) < 1e-6,
           "%s: cross entropy: a logit of -infinity", isa.name);
    for (const int at : {0, 5, 36}) {
        std::vector<float> logits(37, 0.5F);
        logits[at] = NAN;
        expect(std::isnan(loss_of(logits, 0)), "%s: cross entropy: NaN at %d is lost", isa.name, at);
    }
}

// ---- a few rows times weights in any storage ----

void check_few_rows(const Kernels& isa, int n_out, int n_in, Storage storage, int bits, int group) {
    constexpr int kMost = 20, kGap = 3;
    const StoredWeights weights(n_out, n_in, storage, bits, group);
    std::mt19937 random(n_in);
    std::normal_distribution<float> normal;
    std::vector<float> x(kMost * (n_in + kGap)), row(n_in), alone(kMost * n_out);
    for (float& value : x) value = normal(random);
    for (int j = 0; j < n_out; ++j) {
        isa.weight_row(weights.view.from(j), n_in, row.data());
        for (int k = 0; k < n_in; ++k)
            expect(std::fabs(row[k] - weights.exact[static_cast<size_t>(j) * n_in + k]) <= 1e-6,
                   "%s: weight %d, %d of %d bits is %g", isa.name, j, k, bits, row[k]);
    }

    // On a 64-byte boundary, as scratch() gives it.
    const size_t quantized = isa.quantized_row(weights.view, n_in);
    std::vector<float> memory(16 + quantized * kMost + isa.few_rows_scratch(weights.view, n_in));
    float* const scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 4;
    Rows rows{x.data(), n_in + kGap};
    if (quantized > 0) {
        rows = {scratch + isa.few_rows_scratch(weights.view, n_in), static_cast<ptrdiff_t>(quantized)};
        for (int i = 0; i < kMost; ++i)
            isa.quantize(x.data() + i * (n_in + kGap), weights.view, n_in, rows.data + i * rows.stride);
    }
    const auto multiply = [&](int first, int n, Rows out) {
        isa.few_rows({rows.data + first * rows.stride, rows.stride}, n, weights.view, n_out, n_in, out,
                     scratch);
    };
    for (int i = 0; i < kMost; ++i) multiply(i, 1, {alone.data() + i * n_out, n_out});
    double worst = 0;
    for (int i = 0; i < kMost; ++i)
        for (int j = 0; j < n_out; ++j) {
            double exact = 0, of_x = 0, of_weights = 0;
            for (int k = 0; k < n_in; ++k) {
                const double a = x[i * (n_in + kGap) + k],
                             b = weights.exact[static_cast<size_t>(j) * n_in + k];
                exact += a * b;
                of_x += a * a;
                of_weights += b * b;
            }
            const double off = std::fabs(alone[i * n_out + j] - exact) / std::sqrt(of_x * of_weights);
            worst = off <= worst ? worst : off;
        }
    expect(worst <= (bits == 0 ? 1e-6 : 1.5e-5),
           "%s: few rows (%d, %d), storage %d, %d bits by %d, is off by %g", isa.name, n_out, n_in,
           static_cast<int>(storage), bits, group, worst);
    for (int n = 2; n <= kMost; ++n) {
        std::vector<float> out(n * (n_out + kGap), 1e30F);
        multiply(0, n, {out.data(), n_out + kGap});
        bool same = true;
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < n_out; ++j) same &= out[i * (n_out + kGap) + j] == alone[i * n_out + j];
            for (int j = n_out; j < n_out + kGap; ++j) same &= out[i * (n_out + kGap) + j] == 1e30F;
        }
        expect(same, "%s: few rows (%d, %d), %d bits: %d rows give other bits than each alone", isa.name,
               n_out, n_in, bits, n);
    }
}

void check_few_rows(const Kernels& isa) {
    for (const int n_out : {1, 3, 4, 45})
        for (const int n_in : {1, 7, 33, 130, 128, 896})
            for_storages(n_in, [&](Storage storage, int bits, int group) {
                check_few_rows(isa, n_out, n_in, storage, bits, group);
            });
}

/// x with NaN, infinities, tiny numbers or zeros in one group of two, times quantized weights.
void check_odd_x(const Kernels& isa) {
    const StoredWeights weights(5, 128, Storage::kFloat16, 4, 64);
    std::vector<float> memory(16 + isa.quantized_row(weights.view, 128) +
                              isa.few_rows_scratch(weights.view, 128));
    float* const scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 4;
    float* const row = scratch + isa.few_rows_scratch(weights.view, 128);
    for (const float odd : {NAN, INFINITY, -INFINITY, 0.0F, -0.0F, 1e-44F, 1e-31F, -1e-37F}) {
        std::vector<float> x(128), out(5);
        x[3] = 1;
        for (const int at : {64, 101, 127}) x[at] = odd;
        isa.quantize(x.data(), weights.view, 128, row);
        isa.few_rows({row, 0}, 1, weights.view, 5, 128, {out.data(), 5}, scratch);
        for (int j = 0; j < 5; ++j)
            expect(std::isfinite(odd) ? std::fabs(out[j] - weights.exact[j * 128 + 3]) < 1e-4
                                      : std::isnan(out[j]),
                   "%s: x with %g gives %g", isa.name, odd, out[j]);
    }
}

// ---- calls from several threads ----

void check_threads() {
    static constexpr int B = 2, n_head = 3, T = 150, D = 16, kSize = B * n_head * T * D;
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<float> q(kSize), k(kSize), v(kSize);
    for (auto* x : {&q, &k, &v})
        for (float& value : *x) value = normal(random);
    const auto attend = [&] {
        std::vector<float> results(5 * kSize), lse(B * n_head * T);
        const auto tensor = [](float* data) {
            return Tensor4{data, Storage::kFloat32, n_head * T * D, T * D, D};
        };
        AttentionCall call;
        call.B = B;
        call.n_head = n_head;
        call.T_q = call.T_k = T;
        call.D = D;
        call.q = tensor(q.data());
        call.k = tensor(k.data());
        call.v = tensor(v.data());
        call.out = call.dout = tensor(results.data());
        call.lse = lse.data();
        call.dq = tensor(results.data() + kSize);
        call.dk = tensor(results.data() + 2 * kSize);
        call.dv = tensor(results.data() + 3 * kSize);
        attention_forward(call);
        attention_backward(call);
        return results;
    };
    const std::vector<float> expected = attend();
    std::vector<std::thread> threads;
    std::vector<int> same(4);
    for (int n = 0; n < 4; ++n)
        threads.emplace_back([&, n] {
            for (int run = 0; run < 5; ++run) same[n] += attend() == expected;
        });
    for (std::thread& thread : threads) thread.join();
    for (const int n : same) expect(n == 5, "attention: %d of 5 runs of a thread gave other bits", 5 - n);

    for (const int n_tasks : {0, 1, 2, 100}) {
        std::vector<int> done(n_tasks);
        parallel_for(n_tasks,
                     [&](int index, int worker) { done[index] += worker < num_threads() ? 1 : 1000; });
        for (const int times : done)
            expect(times == 1, "parallel_for: a task of %d ran %d times", n_tasks, times);
    }
}

// ---- copies ----

float widened(uint16_t bits, Storage storage) {
    if (storage == Storage::kBFloat16) return from_bits(static_cast<uint32_t>(bits) << 16);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                       : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                       : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
}

// Checks that every element has the value of its bits, that nothing after `out` is written, and that a value
// that is not finite is noticed at any place.
void check_copy(int rows, int columns, bool transposed, Storage from, Storage to) {
    const int from_size = from == Storage::kFloat32 ? 4 : 2, to_size = to == Storage::kFloat32 ? 4 : 2;
    const int n = rows * columns;
    std::vector<char> memory(n * from_size + 1), out(n * to_size + 8, '\x55');
    std::vector<uint32_t> bits(n);
    std::mt19937 random(n);
    CopyCall call{rows, columns, memory.data() + 1, 0, 0, from, out.data(), to};
    call.x_row = from_size * (transposed ? 1 : columns);
    call.x_column = from_size * (transposed ? rows : 1);
    const auto put = [&](int i, uint32_t value) {
        bits[i] = value;
        std::memcpy(memory.data() + 1 + i / columns * call.x_row + i % columns * call.x_column, &value,
                    from_size);
    };
    const uint32_t exponent = from == Storage::kFloat32    ? 0x7F800000
                              : from == Storage::kBFloat16 ? 0x7F80
                                                           : 0x7C00;
    const uint32_t lowest = exponent & ~(exponent << 1);  // the exponent's last bit
    for (int i = 0; i < n; ++i) {
        uint32_t value = from_size == 4 ? random() : random() & 0xFFFF;
        if ((value & exponent) == exponent) value ^= lowest;
        put(i, value);
    }
    const auto right = [&] {
        for (int i = 0; i < n; ++i) {
            uint32_t expected = bits[i], found = 0;
            if (to_size != from_size) {
                const float value = widened(static_cast<uint16_t>(bits[i]), from);
                std::memcpy(&expected, &value, 4);
            }
            std::memcpy(&found, out.data() + i * to_size, to_size);
            if (expected != found) return false;
        }
        return std::all_of(out.end() - 8, out.end(), [](char c) { return c == '\x55'; });
    };
    const char* layout = transposed ? "transposed" : "straight";
    expect(copy(call) && right(), "copy: (%d, %d) %s, %d to %d bytes", rows, columns, layout, from_size,
           to_size);
    for (const int at : {0, n / 2, n - 1}) {
        const uint32_t before = bits[at];
        put(at, exponent);
        expect(!copy(call) && right(), "copy: infinity at %d of (%d, %d) %s", at, rows, columns, layout);
        put(at, before);
    }
}

void check_copies() {
    constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16};
    constexpr int kShapes[][2] = {{1, 1}, {1, 7}, {5, 1}, {3, 5}, {64, 64}, {65, 63}, {130, 71}, {300, 257}};
    for (const Storage from : kStorages)
        for (const Storage to : {from, Storage::kFloat32})
            for (const auto& [rows, columns] : kShapes)
                for (const bool transposed : {false, true}) check_copy(rows, columns, transposed, from, to);
}

}  // namespace

int main(int argc, char** argv) {
    const std::string part = argc > 1 ? argv[1] : "";
    const bool all = part != "threads";
    if (part == "quick") step = 16381;
    for (const Kernels* isa : all ? usable_kernels() : std::vector<const Kernels*>{}) {
        std::printf("%s\n", isa->name);
        check_table(*isa);
        check_mathematics(*isa);
        check_attention(*isa);
        check_nan(*isa);
        check_dropout(*isa);
        check_layers(*isa);
        check_extreme_logits(*isa);
        check_few_rows(*isa);
        check_odd_x(*isa);
    }
    check_threads();
    check_copies();
    return verdict();
}
