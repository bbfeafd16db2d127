// The Python module mlxgpt._core: checks arguments, releases the GIL, calls. With the two headers that it
// alone includes, arguments.h and recording.h, all that knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/recording.h"
#include "ops/adamw.h"
#include "ops/attention.h"
#include "ops/copy.h"
#include "ops/cross_entropy.h"
#include "ops/dropout.h"
#include "ops/embedding.h"
#include "ops/layer_norm.h"
#include "ops/linear.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace mlxgpt {
namespace {

constexpr int kMostHeadDim = 256;

void check_heads(const Array& array) {
    if (array.info.shape[0] * array.info.shape[1] > INT32_MAX)
        fail(array.where,
             array.name + " is " + shape_text(array.info.shape) + ", expected B * n_head below 2^31");
}

void set_dropout(AttentionCall& call, const char* where, double dropout, uint64_t seed) {
    if (!(dropout >= 0.0 && dropout < 1.0))
        fail(where, "dropout is " + std::to_string(dropout) + ", expected 0 <= dropout < 1");
    call.dropout = static_cast<float>(dropout);
    call.seed = seed;
}

/// Checks what forward and backward share.
AttentionCall attention_call(const char* where, const Array& q, const Array& k, const Array& v,
                             const Array& out, const Array& lse, double scale, bool causal, double dropout,
                             uint64_t seed) {
    if (q.info.ndim != 4)
        fail(where, "q is " + shape_text(q.info.shape) + ", expected (B, n_head, T_q, head_dim)");
    check_heads(q);
    const auto B = q.info.shape[0], n_head = q.info.shape[1], T_q = q.info.shape[2], D = q.info.shape[3];
    if (D > kMostHeadDim)
        fail(where, "q is " + shape_text(q.info.shape) + ", expected a head_dim of at most " +
                        std::to_string(kMostHeadDim));
    const py::ssize_t T_k = k.info.ndim == 4 ? k.info.shape[2] : 0;
    k.expect_shape({B, n_head, T_k, D}, "(" + std::to_string(B) + ", " + std::to_string(n_head) + ", T_k, " +
                                            std::to_string(D) + ")");
    v.expect_shape({B, n_head, T_k, D});
    if (T_q > T_k)
        fail(where, "q has " + std::to_string(T_q) + " positions and k has " + std::to_string(T_k) +
                        ", expected T_q <= T_k");
    out.expect_shape({B, n_head, T_q, D});
    lse.expect_shape({B, n_head, T_q});
    if (!std::isfinite(scale))
        fail(where, "scale is " + std::to_string(scale) + ", expected a finite number");

    for (const Array* array : {&k, &v, &out}) array->expect_storage(q);

    AttentionCall call;
    call.B = static_cast<int>(B);
    call.n_head = static_cast<int>(n_head);
    call.T_q = static_cast<int>(T_q);
    call.T_k = static_cast<int>(T_k);
    call.D = static_cast<int>(D);
    call.q = q.tensor();
    call.k = k.tensor();
    call.v = v.tensor();
    call.out = out.tensor();
    call.lse = lse.contiguous();
    call.scale = static_cast<float>(scale);
    call.causal = causal;
    set_dropout(call, where, dropout, seed);
    return call;
}

void py_attention_forward(const py::buffer& q_, const py::buffer& k_, const py::buffer& v_,
                          const py::buffer& out_, const py::buffer& lse_, double scale, bool causal,
                          double dropout, uint64_t seed) {
    const char* where = "attention";
    const Array q(where, "q", q_, Access::kRead), k(where, "k", k_, Access::kRead),
        v(where, "v", v_, Access::kRead);
    const Array out(where, "out", out_, Access::kWrite), lse(where, "lse", lse_, Access::kWrite);
    const AttentionCall call = attention_call(where, q, k, v, out, lse, scale, causal, dropout, seed);
    expect_distinct({&out, &lse}, {&q, &k, &v});
    const py::gil_scoped_release release;
    attention_forward(call);
}

void py_attention_cached(const py::buffer& q_, const py::buffer& k_, const py::buffer& v_,
                         const py::buffer& keys_, const py::buffer& values_, const py::buffer& offsets_,
                         const py::buffer& out_, double scale) {
    const char* where = "cached attention";
    Array q(where, "q", q_, Access::kRead), k(where, "k", k_, Access::kRead),
        v(where, "v", v_, Access::kRead), keys(where, "keys", keys_, Access::kWrite),
        values(where, "values", values_, Access::kWrite), out(where, "out", out_, Access::kWrite);
    Ids offsets(where, "offsets", offsets_);
    if (q.info.ndim != 4)
        fail(where, "q is " + shape_text(q.info.shape) + ", expected (B, n_head, T, head_dim)");
    check_heads(q);
    const auto B = q.info.shape[0], n_head = q.info.shape[1], T = q.info.shape[2], D = q.info.shape[3];
    if (D > kMostHeadDim)
        fail(where, "q is " + shape_text(q.info.shape) + ", expected a head_dim of at most " +
                        std::to_string(kMostHeadDim));
    const py::ssize_t capacity = keys.info.ndim == 4 ? keys.info.shape[2] : 0;
    for (const Array* array : {&k, &v, &out}) array->expect_shape({B, n_head, T, D});
    for (const Array* array : {&q, &k, &v, &out}) array->expect_float32();
    keys.expect_shape({B, n_head, capacity, D}, "(" + std::to_string(B) + ", " + std::to_string(n_head) +
                                                    ", capacity, " + std::to_string(D) + ")");
    values.expect_shape({B, n_head, capacity, D});
    values.expect_storage(keys);
    if (offsets.info.ndim != 1 || offsets.info.shape[0] != B)
        fail(where,
             "offsets is " + shape_text(offsets.info.shape) + ", expected (" + std::to_string(B) + ",)");
    if (!std::isfinite(scale))
        fail(where, "scale is " + std::to_string(scale) + ", expected a finite number");
    expect_distinct({&out, &keys, &values}, {&q, &k, &v, &offsets});
    CachedAttention call;
    call.B = static_cast<int>(B);
    call.n_head = static_cast<int>(n_head);
    call.T = static_cast<int>(T);
    call.D = static_cast<int>(D);
    call.capacity = static_cast<int>(capacity);
    call.q = q.tensor();
    call.k = k.tensor();
    call.v = v.tensor();
    call.out = out.tensor();
    call.keys = keys.tensor();
    call.values = values.tensor();
    call.offsets = static_cast<const int32_t*>(offsets.info.ptr);
    call.scale = static_cast<float>(scale);
    Recording::run([call] { attention_cached(call); }, std::move(q), std::move(k), std::move(v),
                   std::move(keys), std::move(values), std::move(out), std::move(offsets));
}

void py_attention_backward(const py::buffer& q_, const py::buffer& k_, const py::buffer& v_,
                           const py::buffer& out_, const py::buffer& lse_, const py::buffer& dout_,
                           const py::buffer& dq_, const py::buffer& dk_, const py::buffer& dv_, double scale,
                           bool causal, double dropout, uint64_t seed) {
    const char* where = "attention backward";
    const Array q(where, "q", q_, Access::kRead), k(where, "k", k_, Access::kRead),
        v(where, "v", v_, Access::kRead);
    const Array out(where, "out", out_, Access::kRead), lse(where, "lse", lse_, Access::kRead);
    const Array dout(where, "dout", dout_, Access::kRead);
    const Array dq(where, "dq", dq_, Access::kWrite), dk(where, "dk", dk_, Access::kWrite),
        dv(where, "dv", dv_, Access::kWrite);
    AttentionCall call = attention_call(where, q, k, v, out, lse, scale, causal, dropout, seed);
    dout.expect_shape({call.B, call.n_head, call.T_q, call.D});
    dq.expect_shape({call.B, call.n_head, call.T_q, call.D});
    dk.expect_shape({call.B, call.n_head, call.T_k, call.D});
    dv.expect_shape({call.B, call.n_head, call.T_k, call.D});
    for (const Array* array : {&dout, &dq, &dk, &dv}) array->expect_storage(q);
    expect_distinct({&dq, &dk, &dv}, {&q, &k, &v, &out, &lse, &dout});
    call.dout = dout.tensor();
    call.dq = dq.tensor();
    call.dk = dk.tensor();
    call.dv = dv.tensor();
    const py::gil_scoped_release release;
    attention_backward(call);
}

void py_dropout_mask(const py::buffer& mask_, double dropout, uint64_t seed) {
    const Array mask("dropout_mask", "mask", mask_, Access::kWrite);
    if (mask.info.ndim != 4)
        fail(mask.where, "mask is " + shape_text(mask.info.shape) + ", expected (B, n_head, T_q, T_k)");
    check_heads(mask);
    AttentionCall call;
    call.B = static_cast<int>(mask.info.shape[0]);
    call.n_head = static_cast<int>(mask.info.shape[1]);
    call.T_q = static_cast<int>(mask.info.shape[2]);
    call.T_k = static_cast<int>(mask.info.shape[3]);
    set_dropout(call, "dropout_mask", dropout, seed);
    float* data = mask.contiguous();
    const py::gil_scoped_release release;
    dropout_mask(call, data);
}

/// GFLOP/s that all threads reach together with multiply-adds alone.
double py_fma_peak(int n) {
    if (n < 1) fail("fma_peak", "n is " + std::to_string(n) + ", expected at least 1");
    const py::gil_scoped_release release;
    const Kernels& isa = kernels();
    std::vector<double> operations(num_threads());
    const auto start = std::chrono::steady_clock::now();
    parallel_for(num_threads(), [&](int index, int) { operations[index] = isa.fma_burst(n); });
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    return std::accumulate(operations.begin(), operations.end(), 0.0) / time.count();
}

// ---- the operations beside attention ----

Gelu gelu_named(const char* where, const std::string& name) {
    if (name == "gelu_new") return Gelu::kTanh;
    if (name != "gelu") fail(where, "activation is '" + name + "', expected 'gelu_new' or 'gelu'");
    return Gelu::kExact;
}

void py_linear_forward(const py::buffer& x_, const py::buffer& weight_, const MaybeBuffer& bias_,
                       const py::buffer& out_, const MaybeBuffer& residual_, const MaybeBuffer& activated_,
                       const std::string& activation, double scale, const MaybeBuffer& scales_,
                       const MaybeBuffer& biases_) {
    const char* where = "linear";
    MaybeArray x(where, "x", x_, Access::kRead), weight(where, "weight", weight_, Access::kRead, kWeights),
        scales(where, "scales", scales_, Access::kRead), biases(where, "biases", biases_, Access::kRead),
        bias(where, "bias", bias_, Access::kRead), residual(where, "residual", residual_, Access::kRead),
        out(where, "out", out_, Access::kWrite), activated(where, "activated", activated_, Access::kWrite);
    expect_matrix(*x.array, "(rows, n_in)");
    expect_matrix(*out.array, "(rows, n_out)");
    const auto rows = x->info.shape[0], n_in = x->info.shape[1], n_out = out->info.shape[1];
    expect_distinct({out, activated}, {x, weight, scales, biases, bias, residual});
    LinearForward call;
    call.rows = static_cast<int>(rows);
    call.n_in = static_cast<int>(n_in);
    call.n_out = static_cast<int>(n_out);
    call.x = matrix(*x.array);
    call.weight = weights_of(*weight.array, scales, biases, n_out, n_in);
    call.scale = static_cast<float>(scale);
    if (!std::isfinite(scale))
        fail(where, "scale is " + std::to_string(scale) + ", expected a finite number");
    call.bias = contiguous(bias, {n_out});
    call.out = matrix(out, rows, n_out);
    call.residual = matrix(residual, rows, n_out);
    call.activated = matrix(activated, rows, n_out);
    call.gelu = gelu_named(where, activation);
    if (residual && activated) fail(where, "residual and activated are both given, expected one of them");
    Recording::run([call] { linear_forward(call); }, std::move(x), std::move(weight), std::move(scales),
                   std::move(biases), std::move(bias), std::move(out), std::move(residual),
                   std::move(activated));
}

void py_linear_backward(const py::buffer& dout_, const MaybeBuffer& x_, const py::buffer& weight_,
                        const MaybeBuffer& dx_, const MaybeBuffer& dweight_, const MaybeBuffer& dbias_,
                        bool accumulate, const MaybeBuffer& pre_, const MaybeBuffer& activated_,
                        const std::string& activation) {
    const char* where = "linear backward";
    const MaybeArray dout(where, "dout", dout_, Access::kRead), x(where, "x", x_, Access::kRead),
        weight(where, "weight", weight_, Access::kRead), pre(where, "pre", pre_, Access::kRead),
        dx(where, "dx", dx_, Access::kWrite), dweight(where, "dweight", dweight_, Access::kWrite),
        dbias(where, "dbias", dbias_, Access::kWrite),
        activated(where, "activated", activated_, Access::kWrite);
    expect_matrix(*dout.array, "(rows, n_out)");
    expect_matrix(*weight.array, "(n_out, n_in)");
    const auto rows = dout->info.shape[0], n_out = dout->info.shape[1], n_in = weight->info.shape[1];
    LinearBackward call;
    call.rows = static_cast<int>(rows);
    call.n_in = static_cast<int>(n_in);
    call.n_out = static_cast<int>(n_out);
    call.dout = matrix(*dout.array);
    call.x = matrix(x, rows, n_in);
    call.weight = matrix(weight, n_out, n_in);
    call.dx = matrix(dx, rows, n_in);
    call.dweight = matrix(dweight, n_out, n_in);
    call.dbias = contiguous(dbias, {n_out});
    call.accumulate = accumulate;
    call.pre = matrix(pre, rows, n_in);
    call.activated = matrix(activated, rows, n_in);
    call.gelu = gelu_named(where, activation);
    if (dweight && !x) fail(where, "dweight is given without x");
    if (pre && !dx) fail(where, "pre is given without dx");
    if (activated && !pre) fail(where, "activated is given without pre");
    if (activated && dweight) fail(where, "activated is given with dweight, expected a call for each");
    expect_distinct({dx, dweight, dbias, activated}, {dout, x, weight, pre});
    const py::gil_scoped_release release;
    linear_backward(call);
}

void py_gelu_forward(const py::buffer& x_, const py::buffer& out_, const std::string& activation) {
    const char* where = "gelu";
    MaybeArray x(where, "x", x_, Access::kRead), out(where, "out", out_, Access::kWrite);
    expect_matrix(*x.array, "(rows, n)");
    const auto rows = x->info.shape[0], n = x->info.shape[1];
    expect_distinct({out}, {x});
    const Rows in = matrix(*x.array), to = matrix(out, rows, n);
    const Gelu gelu = gelu_named(where, activation);
    const int n_rows = static_cast<int>(rows), width = static_cast<int>(n);
    Recording::run([=] { gelu_forward(n_rows, width, in, gelu, to); }, std::move(x), std::move(out));
}

void py_gelu_backward(const py::buffer& x_, const py::buffer& dx_, const std::string& activation) {
    const char* where = "gelu backward";
    const MaybeArray x(where, "x", x_, Access::kRead), dx(where, "dx", dx_, Access::kWrite);
    expect_matrix(*x.array, "(rows, n)");
    const auto rows = x->info.shape[0], n = x->info.shape[1];
    expect_distinct({dx}, {x});
    const Rows in = matrix(*x.array), gradient = matrix(dx, rows, n);
    const Gelu gelu = gelu_named(where, activation);
    const py::gil_scoped_release release;
    gelu_backward(static_cast<int>(rows), static_cast<int>(n), in, gelu, gradient, {});
}

void py_layer_norm_forward(const py::buffer& x_, const py::buffer& weight_, const MaybeBuffer& bias_,
                           float eps, const py::buffer& out_, const py::buffer& mean_,
                           const py::buffer& rstd_) {
    const char* where = "layer_norm";
    MaybeArray x(where, "x", x_, Access::kRead), weight(where, "weight", weight_, Access::kRead),
        bias(where, "bias", bias_, Access::kRead), out(where, "out", out_, Access::kWrite),
        mean(where, "mean", mean_, Access::kWrite), rstd(where, "rstd", rstd_, Access::kWrite);
    expect_matrix(*x.array, "(rows, C)");
    const auto rows = x->info.shape[0], C = x->info.shape[1];
    if (!(eps >= 0) || !std::isfinite(eps))
        fail(where, "eps is " + std::to_string(eps) + ", expected 0 or more");
    const float *in = x->contiguous(), *w = contiguous(weight, {C}), *b = contiguous(bias, {C});
    float *to = contiguous(out, {rows, C}), *m = contiguous(mean, {rows}), *r = contiguous(rstd, {rows});
    expect_distinct({out, mean, rstd}, {x, weight, bias});
    const int n_rows = static_cast<int>(rows), n = static_cast<int>(C);
    Recording::run([=] { layer_norm_forward(n_rows, n, in, w, b, eps, to, m, r); }, std::move(x),
                   std::move(weight), std::move(bias), std::move(out), std::move(mean), std::move(rstd));
}

void py_layer_norm_backward(const py::buffer& dout_, const py::buffer& x_, const py::buffer& weight_,
                            const py::buffer& mean_, const py::buffer& rstd_, const py::buffer& dx_,
                            const MaybeBuffer& dweight_, const MaybeBuffer& dbias_, bool add_to_dx,
                            bool accumulate) {
    const char* where = "layer_norm backward";
    const MaybeArray dout(where, "dout", dout_, Access::kRead), x(where, "x", x_, Access::kRead),
        weight(where, "weight", weight_, Access::kRead), mean(where, "mean", mean_, Access::kRead),
        rstd(where, "rstd", rstd_, Access::kRead), dx(where, "dx", dx_, Access::kWrite),
        dweight(where, "dweight", dweight_, Access::kWrite), dbias(where, "dbias", dbias_, Access::kWrite);
    expect_matrix(*x.array, "(rows, C)");
    const auto rows = x->info.shape[0], C = x->info.shape[1];
    LayerNormBackward call{};
    call.rows = static_cast<int>(rows);
    call.n = static_cast<int>(C);
    call.dout = contiguous(dout, {rows, C});
    call.x = x->contiguous();
    call.weight = contiguous(weight, {C});
    call.mean = contiguous(mean, {rows});
    call.rstd = contiguous(rstd, {rows});
    call.dx = contiguous(dx, {rows, C});
    call.dweight = contiguous(dweight, {C});
    call.dbias = contiguous(dbias, {C});
    call.add_to_dx = add_to_dx;
    call.accumulate = accumulate;
    expect_distinct({dx, dweight, dbias}, {dout, x, weight, mean, rstd});
    const py::gil_scoped_release release;
    layer_norm_backward(call);
}

/// The shape of ids.
std::pair<py::ssize_t, py::ssize_t> batch_of(const Ids& ids) {
    if (ids.info.ndim != 2) fail(ids.where, "ids is " + shape_text(ids.info.shape) + ", expected (B, T)");
    return {ids.info.shape[0], ids.info.shape[1]};
}

void py_embedding_forward(const py::buffer& ids_, const py::buffer& tokens_, const MaybeBuffer& positions_,
                          const py::buffer& out_, const MaybeBuffer& offsets_, const MaybeBuffer& scales_,
                          const MaybeBuffer& biases_) {
    const char* where = "embedding";
    Ids ids(where, "ids", ids_);
    MaybeArray tokens(where, "tokens", tokens_, Access::kRead, kWeights),
        scales(where, "scales", scales_, Access::kRead), biases(where, "biases", biases_, Access::kRead),
        positions(where, "positions", positions_, Access::kRead), out(where, "out", out_, Access::kWrite);
    std::optional<Ids> offsets;
    if (offsets_) offsets.emplace(where, "offsets", *offsets_);
    expect_matrix(*tokens.array, "(V, C)");
    const auto [B, T] = batch_of(ids);
    if (out->info.ndim != 3) fail(where, "out is " + shape_text(out->info.shape) + ", expected (B, T, C)");
    const auto V = tokens->info.shape[0], C = out->info.shape[2];
    EmbeddingForward call;
    call.B = static_cast<int>(B);
    call.T = static_cast<int>(T);
    call.C = static_cast<int>(C);
    const Values wanted = ids.values();
    call.ids = wanted.data;
    call.tokens = weights_of(*tokens.array, scales, biases, V, C);
    call.out = contiguous(out, {B, T, C});
    Values starts;
    py::ssize_t n_starts = 0;
    if (offsets) {
        if (!positions) fail(where, "offsets is given without positions");
        expect_matrix(*positions.array, "(n_positions, C)");
        const auto n_positions = positions->info.shape[0];
        if (offsets->info.ndim != 1 || offsets->info.shape[0] != B)
            fail(where,
                 "offsets is " + shape_text(offsets->info.shape) + ", expected (" + std::to_string(B) + ",)");
        call.positions = contiguous(positions, {n_positions, C});
        starts = offsets->values();
        n_starts = n_positions - T + 1;
        call.offsets = starts.data;
    } else {
        call.positions = contiguous(positions, {T, C});
    }
    expect_distinct({out}, {&ids, tokens, scales, biases, positions, offsets ? &*offsets : nullptr});
    Recording::run(
        [=] {
            wanted.expect_within(0, V);
            starts.expect_within(0, n_starts, "offset");
            embedding_forward(call);
        },
        std::move(ids), std::move(tokens), std::move(scales), std::move(biases), std::move(positions),
        std::move(out), std::move(offsets));
}

void py_embedding_backward(const py::buffer& ids_, const py::buffer& dout_, const MaybeBuffer& dtokens_,
                           const MaybeBuffer& dpositions_) {
    const char* where = "embedding backward";
    const Ids ids(where, "ids", ids_);
    const MaybeArray dout(where, "dout", dout_, Access::kRead),
        dtokens(where, "dtokens", dtokens_, Access::kWrite),
        dpositions(where, "dpositions", dpositions_, Access::kWrite);
    const auto [B, T] = batch_of(ids);
    if (dout->info.ndim != 3) fail(where, "dout is " + shape_text(dout->info.shape) + ", expected (B, T, C)");
    const auto C = dout->info.shape[2];
    const float* from = contiguous(dout, {B, T, C});
    const py::ssize_t V = dtokens && dtokens->info.ndim == 2 ? dtokens->info.shape[0] : INT32_MAX;
    float *tokens = contiguous(dtokens, {V, C}), *positions = contiguous(dpositions, {T, C});
    const int32_t* rows = ids.within(0, V);
    expect_distinct({dtokens, dpositions}, {&ids, dout});
    const py::gil_scoped_release release;
    embedding_backward(static_cast<int>(B), static_cast<int>(T), static_cast<int>(C), rows, from, tokens,
                       positions);
}

const int32_t* targets_of(const Ids& targets, py::ssize_t N, py::ssize_t V) {
    if (targets.info.ndim != 1 || targets.info.shape[0] != N)
        fail(targets.where,
             "targets is " + shape_text(targets.info.shape) + ", expected (" + std::to_string(N) + ",)");
    return targets.within(-1, V);
}

double py_linear_cross_entropy(const py::buffer& x_, const py::buffer& weight_, const py::buffer& targets_,
                               const MaybeBuffer& dx_, const MaybeBuffer& dweight_, bool accumulate,
                               double scale, const MaybeBuffer& scales_, const MaybeBuffer& biases_) {
    const char* where = "linear_cross_entropy";
    const MaybeArray x(where, "x", x_, Access::kRead),
        weight(where, "weight", weight_, Access::kRead, kWeights),
        scales(where, "scales", scales_, Access::kRead), biases(where, "biases", biases_, Access::kRead),
        dx(where, "dx", dx_, Access::kWrite), dweight(where, "dweight", dweight_, Access::kWrite);
    const Ids targets(where, "targets", targets_);
    expect_matrix(*x.array, "(N, C)");
    expect_matrix(*weight.array, "(V, C)");
    const auto N = x->info.shape[0], C = x->info.shape[1], V = weight->info.shape[0];
    LinearCrossEntropy call;
    call.N = static_cast<int>(N);
    call.C = static_cast<int>(C);
    call.V = static_cast<int>(V);
    call.x = matrix(*x.array);
    call.weight = weights_of(*weight.array, scales, biases, V, C);
    if (dx || dweight) weight->expect_float32();
    call.targets = targets_of(targets, N, V);
    call.dx = matrix(dx, N, C);
    call.dweight = matrix(dweight, V, C);
    call.accumulate = accumulate;
    call.scale = static_cast<float>(scale);
    if (!std::isfinite(scale))
        fail(where, "scale is " + std::to_string(scale) + ", expected a finite number");
    expect_distinct({dx, dweight}, {x, weight, scales, biases, &targets});
    const py::gil_scoped_release release;
    return linear_cross_entropy(call);
}

double py_cross_entropy(const py::buffer& logits_, const py::buffer& targets_, const MaybeBuffer& dlogits_) {
    const char* where = "cross_entropy";
    const MaybeArray logits(where, "logits", logits_, Access::kRead),
        dlogits(where, "dlogits", dlogits_, Access::kWrite);
    const Ids targets(where, "targets", targets_);
    expect_matrix(*logits.array, "(N, V)");
    const auto N = logits->info.shape[0], V = logits->info.shape[1];
    const int32_t* ids = targets_of(targets, N, V);
    const Rows in = matrix(*logits.array), out = matrix(dlogits, N, V);
    expect_distinct({dlogits}, {logits, &targets});
    const py::gil_scoped_release release;
    return cross_entropy(static_cast<int>(N), static_cast<int>(V), in, ids, out);
}

double py_adamw(const std::vector<py::buffer>& parameters, const std::vector<py::buffer>& gradients,
                const std::vector<py::buffer>& m, const std::vector<py::buffer>& v,
                const std::vector<bool>& decayed, double learning_rate, double beta1, double beta2,
                double eps, double weight_decay, long step, double max_norm) {
    const char* where = "adamw";
    const size_t n = parameters.size();
    for (const size_t other : {gradients.size(), m.size(), v.size(), decayed.size()})
        if (other != n)
            fail(where, "a list has " + std::to_string(other) + " entries, expected " + std::to_string(n));
    if (step < 1) fail(where, "step is " + std::to_string(step) + ", expected 1 or more");
    for (const double beta : {beta1, beta2})
        if (!(beta >= 0 && beta < 1))
            fail(where, "a beta is " + std::to_string(beta) + ", expected 0 <= beta < 1");
    for (const auto& [name, value] : std::initializer_list<std::pair<const char*, double>>{
             {"learning_rate", learning_rate}, {"eps", eps}, {"weight_decay", weight_decay}})
        if (!(value >= 0) || !std::isfinite(value))
            fail(where, name + (" is " + std::to_string(value)) + ", expected a finite number, 0 or more");
    if (!(max_norm >= 0)) fail(where, "max_norm is " + std::to_string(max_norm) + ", expected 0 or more");
    std::vector<AdamWTensor> tensors;
    std::vector<Stretch> stretches;
    for (size_t i = 0; i < n; ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        const Array parameter(where, "parameters" + at, parameters[i], Access::kWrite);
        const Array gradient(where, "gradients" + at, gradients[i], Access::kRead);
        const Array first(where, "m" + at, m[i], Access::kWrite);
        const Array second(where, "v" + at, v[i], Access::kWrite);
        for (const Array* other : {&gradient, &first, &second})
            if (other->info.shape != parameter.info.shape)
                fail(where, other->name + " is " + shape_text(other->info.shape) + ", expected " +
                                shape_text(parameter.info.shape));
        tensors.push_back({parameter.contiguous(), gradient.contiguous(), first.contiguous(),
                           second.contiguous(), static_cast<ptrdiff_t>(parameter.info.size), decayed[i]});
        for (const Array* array : {&parameter, &gradient, &first, &second})
            stretches.push_back(
                {static_cast<float*>(array->info.ptr), array->info.size, array->name, array != &gradient});
    }
    expect_distinct(where, std::move(stretches));
    const py::gil_scoped_release release;
    return adamw(tensors, {learning_rate, beta1, beta2, eps, weight_decay, step, max_norm});
}

void py_dropout(const py::buffer& x_, const MaybeBuffer& residual_, double p, uint64_t seed,
                const py::buffer& out_) {
    const char* where = "dropout";
    const MaybeArray x(where, "x", x_, Access::kRead), residual(where, "residual", residual_, Access::kRead),
        out(where, "out", out_, Access::kWrite);
    if (!(p >= 0.0 && p < 1.0)) fail(where, "p is " + std::to_string(p) + ", expected 0 <= p < 1");
    for (const MaybeArray* other : {&residual, &out})
        if (*other && (*other)->info.shape != x->info.shape)
            fail(where, (*other)->name + " is " + shape_text((*other)->info.shape) + ", expected " +
                            shape_text(x->info.shape));
    const float *from = x->contiguous(), *more = residual ? residual->contiguous() : nullptr;
    float* to = out->contiguous();
    const auto n = static_cast<ptrdiff_t>(x->info.size);
    expect_distinct({out}, {x, residual});
    const py::gil_scoped_release release;
    dropout(n, from, more, static_cast<float>(p), seed, to);
}

bool py_copy(const py::buffer& x_, const py::buffer& out_) {
    const char* where = "copy";
    const Array x(where, "x", x_, Access::kReadUnaligned), out(where, "out", out_, Access::kWrite);
    const auto n_axes = x.info.ndim;
    if (n_axes != 1 && n_axes != 2)
        fail(where, "x is " + shape_text(x.info.shape) + ", expected one axis or two");
    if (out.info.shape != x.info.shape)
        fail(where, "out is " + shape_text(out.info.shape) + ", expected " + shape_text(x.info.shape));
    if (out.storage != Storage::kFloat32) out.expect_storage(x);
    out.expect_contiguous();
    CopyCall call;
    call.rows = n_axes == 2 ? x.info.shape[0] : 1;
    call.columns = x.info.shape.back();
    call.x = static_cast<const char*>(x.info.ptr);
    call.x_row = n_axes == 2 ? x.info.strides[0] : 0;
    call.x_column = x.info.strides.back();
    call.x_storage = x.storage;
    call.out = out.info.ptr;
    call.out_storage = out.storage;
    const auto apart = [&](py::ssize_t n, py::ssize_t stride) { return n > 1 && stride != x.info.itemsize; };
    if (apart(call.columns, call.x_column) && apart(call.rows, call.x_row))
        fail(where, "x has no axis with a stride of 1, expected one");
    expect_distinct({&out}, {&x});
    const py::gil_scoped_release release;
    return copy(call);
}

void py_vector_math(const std::string& name, const py::buffer& x_, const py::buffer& out_) {
    const char* where = "_vector_math";
    const Array x(where, "x", x_, Access::kRead), out(where, "out", out_, Access::kWrite);
    out.expect_shape({x.info.size});
    expect_distinct({&out}, {&x});
    const Kernels& isa = kernels();
    Kernels::Function* const function = name == "exp2_nonpositive" ? isa.exp2_nonpositive
                                        : name == "exp"            ? isa.exp
                                        : name == "log"            ? isa.log
                                        : name == "tanh"           ? isa.tanh
                                        : name == "erf"            ? isa.erf
                                                                   : nullptr;
    if (function == nullptr)
        fail(where, "name is '" + name + "', expected exp2_nonpositive, exp, log, tanh or erf");
    function(x.contiguous(), out.contiguous(), x.info.size);
}

void define_operations(py::module_& m) {
    using namespace py::literals;
    m.def(
        "linear_forward", &py_linear_forward, "x"_a, "weight"_a, "bias"_a.none(true), "out"_a, py::kw_only(),
        "residual"_a = py::none(), "activated"_a = py::none(), "activation"_a = "gelu_new", "scale"_a = 1.0,
        "scales"_a = py::none(), "biases"_a = py::none(),
        R"(out = scale x weight^T + bias + residual, or out = scale x weight^T + bias and activated = gelu(out).

x: (rows, n_in); weight: (n_out, n_in); bias: (n_out,); out, residual, activated: (rows, n_out). Rows may lie
apart. activation: gelu_new, GPT-2's tanh form, or gelu, the exact one.

weight may be float32, float16, the bits of bfloat16 in uint16, or quantized as mx.quantize does it with 4 or 8
bits: words in uint32, (n_out, n_in * bits / 32), with scales and biases (n_out, n_in / group) for groups of 32, 64
or 128 elements, in any of those three. x is then quantized too where it has few rows, to 16 bits by groups.)");
    m.def(
        "linear_backward", &py_linear_backward, "dout"_a, "x"_a.none(true), "weight"_a, "dx"_a.none(true),
        "dweight"_a.none(true), "dbias"_a.none(true), py::kw_only(), "accumulate"_a = false,
        "pre"_a = py::none(), "activated"_a = py::none(), "activation"_a = "gelu_new",
        R"(Writes dx = dout weight, dweight = dout^T x and dbias, the sum over rows; None is not computed, and x may be
None without dweight.

With accumulate, dweight and dbias are added to. If x = gelu(pre), dx becomes the gradient of pre, and
activated, if given, gelu(pre) again.)");
    m.def("gelu_forward", &py_gelu_forward, "x"_a, "out"_a, "activation"_a, "out = gelu(x), each (rows, n).");
    m.def("gelu_backward", &py_gelu_backward, "x"_a, "dx"_a, "activation"_a,
          "dx *= gelu'(x): the gradient of gelu_forward in the place of its output's.");
    m.def("layer_norm_forward", &py_layer_norm_forward, "x"_a, "weight"_a, "bias"_a.none(true), "eps"_a,
          "out"_a, "mean"_a, "rstd"_a,
          "out = (x - mean) * rstd * weight + bias by rows, x: (rows, C), rstd = 1 / sqrt(variance + eps). "
          "mean and rstd: (rows,) are written for the backward pass.");
    m.def(
        "layer_norm_backward", &py_layer_norm_backward, "dout"_a, "x"_a, "weight"_a, "mean"_a, "rstd"_a,
        "dx"_a, "dweight"_a.none(true), "dbias"_a.none(true), py::kw_only(), "add_to_dx"_a = false,
        "accumulate"_a = false,
        "Writes dx, dweight and dbias, or adds to dx, or to dweight and dbias; of the latter two None is not "
        "computed.");
    m.def("embedding_forward", &py_embedding_forward, "ids"_a, "tokens"_a, "positions"_a.none(true), "out"_a,
          py::kw_only(), "offsets"_a = py::none(), "scales"_a = py::none(), "biases"_a = py::none(),
          R"(out[b, t] = tokens[ids[b, t]] + positions[offsets[b] + t].

ids: (B, T) int32; tokens: (V, C), in any storage that linear_forward takes, with scales and biases if quantized;
positions: (n_positions, C) with offsets (B,) int32, or (T, C) without; out: (B, T, C).)");
    m.def("embedding_backward", &py_embedding_backward, "ids"_a, "dout"_a, "dtokens"_a.none(true),
          "dpositions"_a.none(true),
          "Adds dout (B, T, C) to the rows of dtokens (V, C) and dpositions (T, C).");
    m.def("linear_cross_entropy", &py_linear_cross_entropy, "x"_a, "weight"_a, "targets"_a,
          "dx"_a.none(true) = py::none(), "dweight"_a.none(true) = py::none(), py::kw_only(),
          "accumulate"_a = false, "scale"_a = 1.0, "scales"_a = py::none(), "biases"_a = py::none(),
          R"(Mean of -log softmax(x weight^T)[target] over the targets that are not -1 (0 if there is none).

x: (N, C); weight: (V, C); targets: (N,) int32. Writes scale times the mean's gradients, dx and dweight, unless
None; with accumulate, dweight is added to. The (N, V) logits exist for some rows at a time only.
Without gradients weight may be in any storage that linear_forward takes.)");
    m.def("cross_entropy", &py_cross_entropy, "logits"_a, "targets"_a, "dlogits"_a.none(true) = py::none(),
          "The same of logits (N, V), and their gradient.");
    m.def("adamw", &py_adamw, "parameters"_a, "gradients"_a, "m"_a, "v"_a, "decayed"_a, py::kw_only(),
          "learning_rate"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "step"_a, "max_norm"_a,
          R"(A step of AdamW with bias correction, in place, on lists of arrays; returns the gradients' norm.

Gradients are multiplied by min(1, max_norm / (norm + 1e-6)) first, unless max_norm is 0. Parameters marked in
`decayed` shrink by learning_rate * weight_decay. step counts from 1. If the norm is not finite, nothing is written.)");
    m.def(
        "dropout", &py_dropout, "x"_a, "residual"_a.none(true), "p"_a, "seed"_a, "out"_a,
        "out = x * mask + residual, the mask being 0 with chance p, else 1 / (1 - p): a function of seed and "
        "position. The gradient of x is dropout(dout, None, p, seed, dx).");
    m.def("copy", &py_copy, "x"_a, "out"_a,
          R"(out = x, (n,) or (rows, columns), and returns whether every value is finite.

One of x's axes has a stride of 1, and x may begin anywhere, as it does in a mapped file. out is contiguous, and
of x's type or float32.)");
    m.def("_vector_math", &py_vector_math, "name"_a, "x"_a, "out"_a,
          "A function of kernels/vector_math.h, for tests.");
}

}  // namespace
}  // namespace mlxgpt

PYBIND11_MODULE(_core, m) {
    using namespace mlxgpt;
    using namespace py::literals;
    m.doc() =
        "CPU kernels of mlxgpt. Arrays are float32 and export the buffer protocol; those of attention, and "
        "weights where there are no gradients, may also be float16, or bfloat16 as uint16, and weights "
        "quantized.";
    m.attr("__version__") = MLXGPT_VERSION;

    m.def(
        "isa", [] { return kernels().name; },
        "The instruction set in use: scalar, avx2, avx512, avx512vnni, neon or neondot. MLXGPT_ISA overrides "
        "the "
        "choice.");
    m.def("num_threads", &num_threads,
          "Threads that work on one call. MLXGPT_NUM_THREADS overrides the choice.");

    m.def("attention_forward", &py_attention_forward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, py::kw_only(),
          "scale"_a, "causal"_a = true, "dropout"_a = 0.0, "seed"_a = 0,
          R"(out = softmax(scale * q k^T) v, and lse, the log of the sum of each query's exponentials.

q, out: (B, n_head, T_q, head_dim); k, v: (B, n_head, T_k, head_dim) with T_q <= T_k and head_dim <= 256;
any strides with a contiguous last axis; float32, float16, or the bits of bfloat16 in uint16, all alike.
lse: (B, n_head, T_q), float32, contiguous. Arithmetic is in float32. out and lse are written.
If causal, query i sees keys 0 .. i + T_k - T_q. Each probability is dropped with chance `dropout`, by a
mask that depends on (seed, batch, head, query, key) alone. Raises ValueError for arguments that break
these rules.)");
    m.def("attention_cached", &py_attention_cached, "q"_a, "k"_a, "v"_a, "keys"_a, "values"_a, "offsets"_a,
          "out"_a, py::kw_only(), "scale"_a,
          R"(Attention of T new positions over a cache, to which their keys and values are added first.

q, k, v, out: (B, n_head, T, head_dim) float32; keys, values: (B, n_head, capacity, head_dim) in any storage, of
which sequence b's first offsets[b] are held; offsets: (B,) int32. Position i of sequence b sees keys
0 .. offsets[b] + i. Raises ValueError where there is no room for T more.)");
    m.def("attention_backward", &py_attention_backward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dout"_a,
          "dq"_a, "dk"_a, "dv"_a, py::kw_only(), "scale"_a, "causal"_a = true, "dropout"_a = 0.0,
          "seed"_a = 0,
          R"(Writes dq, dk, dv, the gradients of attention_forward for the output gradient dout.

out and lse are the forward's; shapes and rules are too. Probabilities are computed again from lse, tile
by tile: the extra memory is O(T_k * head_dim) a thread.)");
    m.def("dropout_mask", &py_dropout_mask, "mask"_a, "dropout"_a, "seed"_a,
          "Writes the factors 0 or 1 / (1 - dropout) that attention uses: mask is (B, n_head, T_q, T_k), "
          "contiguous.");
    m.def(
        "fma_peak", &py_fma_peak, "n"_a = 5000000,
        "GFLOP/s that all threads reach with n multiply-adds in each register of a block and nothing else.");

    py::class_<Recording>(m, "Recording",
                          R"(Calls of kernels made in a with statement, to be made again by replay().

What linear_forward, gelu_forward, layer_norm_forward, embedding_forward and attention_cached are given is held, and
each time read and written anew: change ids and offsets in place. One at a time in a thread.)")
        .def(py::init<>())
        .def(
            "__enter__",
            [](Recording& self) -> Recording& {
                self.start();
                return self;
            },
            py::return_value_policy::reference)
        .def("__exit__", [](Recording& self, const py::args&) { self.stop(); })
        .def("replay", &Recording::replay, "Makes the calls again, in order.")
        .def("__len__", &Recording::size);

    define_operations(m);
}
