// What a set of kernels offers: plain functions over pointers, sizes and strides, one table for each
// instruction set. Nothing here knows Python, threads or MLX.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mlxgpt {

/// Rows of contiguous elements: row i begins at data + i * stride.
struct Rows {
    float* data = nullptr;
    ptrdiff_t stride = 0;
};

/// How the elements of an array are stored. All arithmetic is in float32.
enum class Storage { kFloat32, kBFloat16, kFloat16 };
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

/// Rows in any storage: row i begins i * stride elements behind data.
struct StoredRows {
    void* data = nullptr;
    ptrdiff_t stride = 0;
    Storage storage = Storage::kFloat32;
};

/// A linear layer's weights as a model keeps them, n_out rows of n_in: floats in any storage, or quantized as
/// MLX does it (mx.quantize, mode "affine"). Then element i of a row is scale * q + bias with the unsigned q
/// in bits [bits * i, bits * (i + 1)) of the row's uint32 words, the lowest bits first, and a scale and a
/// bias for each `group` of elements.
struct Weights {
    const void* data = nullptr;           // row i begins at data + i * stride
    ptrdiff_t stride = 0;                 // in floats, or in words
    Storage storage = Storage::kFloat32;  // of the floats; of scales and biases, if quantized
    int bits = 0;                         // 4 or 8 if quantized, else 0
    int group = 0;                        // 32, 64 or 128 if quantized
    const void *scales = nullptr, *biases = nullptr;
    ptrdiff_t scale_stride = 0;  // n_in / group

    ptrdiff_t element_size() const { return storage == Storage::kFloat32 ? 4 : 2; }
    bool is_float32() const { return bits == 0 && storage == Storage::kFloat32; }

    /// The weights without the rows ahead of `row`.
    Weights from(ptrdiff_t row) const {
        Weights rest = *this;
        rest.data = static_cast<const char*>(data) + row * stride * (bits == 0 ? element_size() : 4);
        if (bits != 0) {
            const ptrdiff_t skipped = row * scale_stride * element_size();
            rest.scales = static_cast<const char*>(scales) + skipped;
            rest.biases = static_cast<const char*>(biases) + skipped;
        }
        return rest;
    }

    /// Bytes that n_out rows take.
    double bytes(int n_out, int n_in) const {
        if (bits == 0) return static_cast<double>(n_out) * n_in * element_size();
        return static_cast<double>(n_out) * (n_in / 8.0 * bits + 2.0 * scale_stride * element_size());
    }
};

/// One head of one attention call. q, out, dout, dq have T_q rows and k, v, dk, dv have T_k, all of
/// D elements; lse and delta have T_q. Query i sees keys 0 .. i + T_k - T_q if causal, else all.
struct AttentionHead {
    StoredRows q, k, v, out;
    float* lse = nullptr;
    StoredRows dout, dq, dk, dv;  // backward only
    int T_q = 0, T_k = 0, D = 0;
    float scale = 1.0F;
    bool causal = true;
    float dropout = 0.0F;  // chance that a probability is dropped, 0 for none
    uint64_t seed = 0;     // the mask is a function of (seed, batch, head, query, key)
    uint32_t batch = 0, head = 0;
};

// ---- the operations beside attention ----

enum class Gelu { kTanh, kExact };

/// What AdamW is told for a step. Gradients are multiplied by `clip` first.
struct AdamWStep {
    float clip, learning_rate, beta1, beta2, eps;
    float correction1, correction2;  // 1 / (1 - beta^step)
};

/// Kernels over rows that a task was given. `rows` are n_rows by n_cols.
struct OpKernels {
    /// x += bias, and + residual where there is one. bias may be null.
    void (*add_bias)(Rows x, int n_rows, int n_cols, const float* bias, Rows residual);

    /// x += bias; out = gelu(x). bias may be null.
    void (*bias_gelu)(Rows x, int n_rows, int n_cols, const float* bias, Gelu kind, Rows out);

    /// dout *= gelu'(x), in place; out = gelu(x) where out.data is not null.
    void (*gelu_backward)(Rows x, int n_rows, int n_cols, Gelu kind, Rows dout, Rows out);

    /// sums[c] += sum over the rows, in order.
    void (*add_columns)(Rows x, int n_rows, int n_cols, float* sums);

    /// y += x
    void (*add)(const float* x, ptrdiff_t n, float* y);

    /// y *= factor
    void (*scale)(float factor, ptrdiff_t n, float* y);

    /// out = (x - mean) * rstd * weight + bias for each row, of n_cols elements without gaps.
    void (*layer_norm_forward)(const float* x, int n_rows, int n_cols, const float* weight, const float* bias,
                               float eps, float* out, float* mean, float* rstd);

    /// Writes dx, or adds to it, and adds to dweight and dbias (null where there is no bias).
    void (*layer_norm_backward)(const float* dout, const float* x, int n_rows, int n_cols,
                                const float* weight, const float* mean, const float* rstd, float* dx,
                                bool add_to_dx, float* dweight, float* dbias);

    /// -log softmax(logits)[target]. With a factor that is not 0 the logits become their gradient, times
    /// that factor.
    double (*cross_entropy)(float* logits, int V, int target, float factor);

    /// Sum of squares.
    double (*squares)(const float* x, ptrdiff_t n);

    /// out[i] = weight i of the first row, for n_in elements.
    void (*weight_row)(const Weights& weights, int n_in, float* out);

    /// Rows of x for the product with quantized weights: each is quantized too, into this many floats.
    size_t (*quantized_row)(const Weights& weights, int n_in);
    void (*quantize)(const float* x, const Weights& weights, int n_in, float* out);

    /// out[i][j] = x[i] . weights[j] for few rows of x, which were quantized if the weights are. A sum comes
    /// out the same whatever other rows there are.
    void (*few_rows)(Rows x, int n_rows, const Weights& weights, int n_out, int n_in, Rows out,
                     float* scratch);

    /// Floats of scratch that few_rows needs.
    size_t (*few_rows_scratch)(const Weights& weights, int n_in);

    /// One step of AdamW on n elements; decay is what a parameter is multiplied by first.
    void (*adamw)(float* parameter, const float* gradient, float* m, float* v, ptrdiff_t n, float decay,
                  const AdamWStep& step);

    /// out = x * mask + residual (null for none), mask being 0 or 1 / (1 - p). x and out are whole tensors
    /// without gaps: elements first .. first + n, where first is a multiple of 64.
    void (*dropout)(const float* x, const float* residual, uint64_t first, ptrdiff_t n, float p,
                    uint64_t seed, float* out);
};

/// The kernels of one instruction set.
struct Kernels {
    const char* name;

    /// Queries per block: a head has ceil(T_q / query_block) of them.
    int query_block;

    /// Floats of scratch, on a 64-byte boundary, that the two calls below need.
    size_t (*forward_scratch)(int T_k, int D);
    size_t (*backward_scratch)(int T_k, int D);

    /// Floats that the dk and dv sums of one head take.
    size_t (*kv_sums)(int T_k, int D);

    /// Writes out and lse for query blocks first, first + step, first + 2 * step, ...
    void (*attention_forward)(const AttentionHead& head, int first, int step, float* scratch);

    /// Copies n rows of D elements, rounded to the storage of `to`.
    void (*copy_rows)(StoredRows from, int n, int D, StoredRows to);

    /// Writes dq for those query blocks, and what they add to dk and dv into `sums`.
    void (*attention_backward)(const AttentionHead& head, int first, int step, float* scratch, float* sums);

    /// Adds n_parts arrays of sums that lie behind one another, in order, into dk and dv.
    void (*attention_write_kv)(const AttentionHead& head, const float* sums, int n_parts);

    /// Writes one head's dropout factors, 0 or 1 / (1 - dropout), as T_q rows of T_k.
    void (*dropout_mask)(const AttentionHead& head, float* mask);

    /// y[i] = f(x[i]) for n elements; errors in ulp are stated in vector_math.h.
    using Function = void(const float* x, float* y, ptrdiff_t n);
    Function *exp2_nonpositive, *exp, *log, *tanh, *erf;

    /// Does nothing but multiply-adds, n on each of a register block's sums, and returns how many
    /// floating-point operations that were: what the processor can do at most.
    double (*fma_burst)(int n);

    const OpKernels* ops;
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
extern const Kernels kernels_neon;
extern const Kernels kernels_neondot;

}  // namespace mlxgpt
