// The kernels that each instruction set offers, as a table of plain functions over pointers, sizes and
// strides, and the list of instruction sets. The layers above include this file and no other of kernels/.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mlxgpt {

/// Rows of contiguous elements: row i begins at data + i * stride.
struct Rows {
    float* data = nullptr;
    ptrdiff_t stride = 0;

    /// The rows from row `row` on.
    Rows from(ptrdiff_t row) const { return {data + row * stride, stride}; }
};

/// How the elements of an array are stored. All arithmetic is in float32.
enum class Storage { kFloat32, kBFloat16, kFloat16 };
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

/// Rows in any storage: row i begins at data + i * stride, in elements.
struct StoredRows {
    void* data = nullptr;
    ptrdiff_t stride = 0;
    Storage storage = Storage::kFloat32;
};

/// A linear layer's weights as a model keeps them, n_out rows of n_in: floats in any storage, or quantized in
/// the layout of mx.quantize (mode "affine"). Element i of a quantized row is scale * q + bias: the unsigned
/// q lies in bits [bits * i, bits * (i + 1)) of the row's uint32 words, lowest bits first, and each `group`
/// of elements shares a scale and a bias.
struct Weights {
    const void* data = nullptr;           // row i begins at data + i * stride
    ptrdiff_t stride = 0;                 // in floats, or in words if quantized
    Storage storage = Storage::kFloat32;  // of the floats, or of scales and biases if quantized
    int bits = 0;                         // 4 or 8 if quantized, else 0
    int group = 0;                        // 32, 64 or 128 if quantized
    const void *scales = nullptr, *biases = nullptr;
    ptrdiff_t scale_stride = 0;  // n_in / group

    ptrdiff_t element_size() const { return storage == Storage::kFloat32 ? 4 : 2; }
    bool is_float32() const { return bits == 0 && storage == Storage::kFloat32; }

    /// The weights from row `row` on.
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

    /// Bytes of n_out rows.
    double bytes(int n_out, int n_in) const {
        if (bits == 0) return static_cast<double>(n_out) * n_in * element_size();
        return static_cast<double>(n_out) * (n_in / 8.0 * bits + 2.0 * scale_stride * element_size());
    }
};

/// One head of one attention call. q, out, dout and dq have T_q rows of D elements, k, v, dk and dv have T_k,
/// and lse has T_q elements. Query i sees keys 0 .. i + T_k - T_q if causal, else all.
struct AttentionHead {
    StoredRows q, k, v, out;
    float* lse = nullptr;
    StoredRows dout, dq, dk, dv;  // backward only
    int T_q = 0, T_k = 0, D = 0;
    float scale = 1.0F;
    bool causal = true;
    float dropout = 0.0F;  // chance that a probability is dropped
    uint64_t seed = 0;     // the mask is a function of (seed, batch, head, query, key)
    uint32_t batch = 0, head = 0;
};

/// What a step of AdamW needs to know. Gradients are multiplied by `clip` first.
struct AdamWStep {
    float clip, learning_rate, beta1, beta2, eps;
    float correction1, correction2;  // 1 / (1 - beta^step)
};

/// An activation function f, and its kernels over n_rows by n_cols elements.
struct Activation {
    /// The name in a model's configuration.
    const char* name;

    /// x += bias; out = f(x). bias may be null.
    void (*forward)(Rows x, int n_rows, int n_cols, const float* bias, Rows out);

    /// dout *= f'(x), in place; also out = f(x) unless out.data is null.
    void (*backward)(Rows x, int n_rows, int n_cols, Rows dout, Rows out);
};

/// The kernels of one instruction set. fill_table.h sets every member by its name. Arrays given as `const
/// float*` or `float*` have no gaps; lengths are in elements.
struct Kernels {
    const char* name;

    // ---- attention ----

    /// Queries per block: a head has ceil(T_q / attention_query_block) blocks.
    int attention_query_block;

    /// The number of entries in `activations`.
    int n_activations;

    /// Floats of scratch, on a 64-byte boundary, that attention_forward and attention_backward need.
    size_t (*attention_forward_scratch)(int T_k, int D);
    size_t (*attention_backward_scratch)(int T_k, int D);

    /// Floats that the sums of dk and dv take for one head.
    size_t (*attention_kv_sums)(int T_k, int D);

    /// Writes out and lse for query blocks first, first + step, first + 2 * step, ...
    void (*attention_forward)(const AttentionHead& head, int first, int step, float* scratch);

    /// Writes dq for query blocks first, first + step, ..., and what these blocks contribute to dk and dv
    /// into `sums`.
    void (*attention_backward)(const AttentionHead& head, int first, int step, float* scratch, float* sums);

    /// Adds up n_parts arrays of sums, contiguous in memory, in order, and writes dk and dv.
    void (*attention_write_kv)(const AttentionHead& head, const float* sums, int n_parts);

    /// Writes the dropout factors of one head, 0 or 1 / (1 - dropout), as T_q rows of T_k.
    void (*dropout_mask)(const AttentionHead& head, float* mask);

    /// Copies n rows of D elements, rounded to the storage of `to`.
    void (*copy_rows)(StoredRows from, int n, int D, StoredRows to);

    // ---- linear layers ----

    /// out[i] = weight i of the first row, for n_in elements.
    void (*weight_row)(const Weights& weights, int n_in, float* out);

    /// Quantizes a row of x for a product with quantized weights, into quantized_row floats: 0 if the weights
    /// are not quantized.
    size_t (*quantized_row)(const Weights& weights, int n_in);
    void (*quantize)(const float* x, const Weights& weights, int n_in, float* out);

    /// out[i][j] = the dot product of x[i] and weights[j], for few rows of x, quantized if the weights are. A
    /// row's results do not depend on the other rows. Needs few_rows_scratch floats of scratch.
    size_t (*few_rows_scratch)(const Weights& weights, int n_in);
    void (*few_rows)(Rows x, int n_rows, const Weights& weights, int n_out, int n_in, Rows out,
                     float* scratch);

    /// x += bias + residual. Either may be null.
    void (*add_bias)(Rows x, int n_rows, int n_cols, const float* bias, Rows residual);

    /// sums[c] += the sum of column c, row after row.
    void (*add_columns)(Rows x, int n_rows, int n_cols, float* sums);

    /// Every activation function.
    const Activation* activations;

    // ---- layer norm, cross entropy, dropout, AdamW ----

    /// out = (x - mean) * rstd * weight + bias for each row; bias may be null.
    void (*layer_norm_forward)(const float* x, int n_rows, int n_cols, const float* weight, const float* bias,
                               float eps, float* out, float* mean, float* rstd);

    /// Writes dx, or adds to it, and adds to dweight and dbias. dbias may be null.
    void (*layer_norm_backward)(const float* dout, const float* x, int n_rows, int n_cols,
                                const float* weight, const float* mean, const float* rstd, float* dx,
                                bool add_to_dx, float* dweight, float* dbias);

    /// Returns -log softmax(logits)[target]. Unless factor is 0, replaces the logits by factor times their
    /// gradient.
    double (*cross_entropy)(float* logits, int V, int target, float factor);

    /// out = x * mask + residual, each mask element 0 with chance p, else 1 / (1 - p). x, out and residual
    /// (null for none) are whole tensors, of which elements first .. first + n are computed; first is a
    /// multiple of 64.
    void (*dropout)(const float* x, const float* residual, uint64_t first, ptrdiff_t n, float p,
                    uint64_t seed, float* out);

    /// The sum of squares.
    double (*squares)(const float* x, ptrdiff_t n);

    /// One step of AdamW on n elements. The parameter is multiplied by `decay` first.
    void (*adamw)(float* parameter, const float* gradient, float* m, float* v, ptrdiff_t n, float decay,
                  const AdamWStep& step);

    // ---- arithmetic ----

    /// y += x
    void (*add)(const float* x, ptrdiff_t n, float* y);

    /// y[i] = f(x[i]) for n elements. vector_math.h states the error bounds.
    using Function = void(const float* x, float* y, ptrdiff_t n);
    Function *exp2_nonpositive, *exp, *log, *tanh, *erf;

    /// Does n multiply-adds on each sum of a register block, with no loads or stores, and returns the number
    /// of floating-point operations: timed, it gives the processor's peak.
    double (*fma_burst)(int n);
};

/// Every instruction set that kernels are written for, as X(name, architecture), from the most general to the
/// fastest of its architecture. target_<name>.cpp defines its kernels, and runtime/dispatch.cpp says which
/// processors run them.
#define MLXGPT_TARGETS(X) \
    X(scalar, ANY)        \
    X(avx2, X86_64)       \
    X(avx512, X86_64)     \
    X(avx512vnni, X86_64) \
    X(neon, AARCH64)      \
    X(neondot, AARCH64)

#define MLXGPT_DECLARE(name, architecture) extern const Kernels kernels_##name;
MLXGPT_TARGETS(MLXGPT_DECLARE)
#undef MLXGPT_DECLARE

}  // namespace mlxgpt
