// Attention, over whole sequences and over a cache.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "bindings/recording.h"
#include "ops/attention.h"

namespace mlxgpt {
namespace {

constexpr int kMostHeadDim = 256;

void expect_heads(const Array& a, const char* shape) {
    expect_axes(a, 4, shape);
    if (a.info.shape[0] * a.info.shape[1] > INT32_MAX)
        fail(a.where, a.name + " is " + shape_text(a.info.shape) + ", expected B * n_head below 2^31");
}

void expect_queries(const Array& q, const char* shape) {
    expect_heads(q, shape);
    if (q.size(3) > kMostHeadDim)
        fail(q.where, "q is " + shape_text(q.info.shape) + ", expected a head_dim of at most " +
                          std::to_string(kMostHeadDim));
}

/// Checks the shape (B, n_head, n, D), where n may be any number; `name` is what messages call it. Returns n.
int expect_rows(const Array& a, int B, int n_head, const char* name, int D) {
    const int n = a.info.ndim == 4 ? a.size(2) : 0;
    a.expect_shape({B, n_head, n, D}, "(" + std::to_string(B) + ", " + std::to_string(n_head) + ", " + name +
                                          ", " + std::to_string(D) + ")");
    return n;
}

void set_dropout(AttentionCall& call, const char* where, double dropout, uint64_t seed) {
    if (!(dropout >= 0.0 && dropout < 1.0))
        fail(where, "dropout is " + std::to_string(dropout) + ", expected 0 <= dropout < 1");
    call.dropout = static_cast<float>(dropout);
    call.seed = seed;
}

/// Checks the arguments that forward and backward share.
AttentionCall attention_call(const char* where, const Array& q, const Array& k, const Array& v,
                             const Array& out, const Array& lse, double scale, bool causal, double dropout,
                             uint64_t seed) {
    expect_queries(q, "(B, n_head, T_q, head_dim)");
    AttentionCall call;
    call.B = q.size(0);
    call.n_head = q.size(1);
    call.T_q = q.size(2);
    call.D = q.size(3);
    call.T_k = expect_rows(k, call.B, call.n_head, "T_k", call.D);
    v.expect_shape({call.B, call.n_head, call.T_k, call.D});
    if (call.T_q > call.T_k)
        fail(where, "q has " + std::to_string(call.T_q) + " positions and k has " + std::to_string(call.T_k) +
                        ", expected T_q <= T_k");
    out.expect_shape({call.B, call.n_head, call.T_q, call.D});
    lse.expect_shape({call.B, call.n_head, call.T_q});
    expect_finite(where, "scale", scale);
    for (const Array* array : {&k, &v, &out}) array->expect_storage(q);
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
        v(where, "v", v_, Access::kRead), out(where, "out", out_, Access::kWrite),
        lse(where, "lse", lse_, Access::kWrite);
    const AttentionCall call = attention_call(where, q, k, v, out, lse, scale, causal, dropout, seed);
    expect_distinct({&out, &lse}, {&q, &k, &v});
    const py::gil_scoped_release release;
    attention_forward(call);
}

void py_attention_backward(const py::buffer& q_, const py::buffer& k_, const py::buffer& v_,
                           const py::buffer& out_, const py::buffer& lse_, const py::buffer& dout_,
                           const py::buffer& dq_, const py::buffer& dk_, const py::buffer& dv_, double scale,
                           bool causal, double dropout, uint64_t seed) {
    const char* where = "attention backward";
    const Array q(where, "q", q_, Access::kRead), k(where, "k", k_, Access::kRead),
        v(where, "v", v_, Access::kRead), out(where, "out", out_, Access::kRead),
        lse(where, "lse", lse_, Access::kRead), dout(where, "dout", dout_, Access::kRead),
        dq(where, "dq", dq_, Access::kWrite), dk(where, "dk", dk_, Access::kWrite),
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

void py_attention_cached(const py::buffer& q_, const py::buffer& k_, const py::buffer& v_,
                         const py::buffer& keys_, const py::buffer& values_, const py::buffer& offsets_,
                         const py::buffer& out_, double scale) {
    const char* where = "cached attention";
    Array q(where, "q", q_, Access::kRead), k(where, "k", k_, Access::kRead),
        v(where, "v", v_, Access::kRead), keys(where, "keys", keys_, Access::kWrite),
        values(where, "values", values_, Access::kWrite), out(where, "out", out_, Access::kWrite);
    Ids offsets(where, "offsets", offsets_);
    expect_queries(q, "(B, n_head, T, head_dim)");
    CachedAttention call;
    call.B = q.size(0);
    call.n_head = q.size(1);
    call.T = q.size(2);
    call.D = q.size(3);
    for (const Array* array : {&k, &v, &out}) array->expect_shape({call.B, call.n_head, call.T, call.D});
    for (const Array* array : {&q, &k, &v, &out}) array->expect_float32();
    call.capacity = expect_rows(keys, call.B, call.n_head, "capacity", call.D);
    values.expect_shape({call.B, call.n_head, call.capacity, call.D});
    values.expect_storage(keys);
    offsets.expect_length(call.B);
    expect_finite(where, "scale", scale);
    expect_distinct({&out, &keys, &values}, {&q, &k, &v, &offsets});
    call.q = q.tensor();
    call.k = k.tensor();
    call.v = v.tensor();
    call.out = out.tensor();
    call.keys = keys.tensor();
    call.values = values.tensor();
    call.offsets = offsets.values().data;
    call.scale = static_cast<float>(scale);
    Recording::run([call] { attention_cached(call); }, std::move(q), std::move(k), std::move(v),
                   std::move(keys), std::move(values), std::move(out), std::move(offsets));
}

void py_dropout_mask(const py::buffer& mask_, double dropout, uint64_t seed) {
    const Array mask("dropout_mask", "mask", mask_, Access::kWrite);
    expect_heads(mask, "(B, n_head, T_q, T_k)");
    AttentionCall call;
    call.B = mask.size(0);
    call.n_head = mask.size(1);
    call.T_q = mask.size(2);
    call.T_k = mask.size(3);
    set_dropout(call, "dropout_mask", dropout, seed);
    float* data = mask.contiguous();
    const py::gil_scoped_release release;
    dropout_mask(call, data);
}

}  // namespace

void bind_attention(py::module_& m) {
    using namespace py::literals;
    m.def("attention_forward", &py_attention_forward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, py::kw_only(),
          "scale"_a, "causal"_a = true, "dropout"_a = 0.0, "seed"_a = 0,
          R"(Writes out = softmax(scale * q k^T) v, and lse, the log of the sum of each query's exponentials.

q, out: (B, n_head, T_q, head_dim); k, v: (B, n_head, T_k, head_dim) with T_q <= T_k and head_dim <= 256; any strides
with a contiguous last axis; all float32, all float16, or all bits of bfloat16 in uint16. lse: (B, n_head, T_q),
float32, contiguous. Arithmetic is in float32.

If causal, query i sees keys 0 .. i + T_k - T_q. Each probability is dropped with chance `dropout`, by a mask that
depends on (seed, batch, head, query, key) alone. Raises ValueError for arguments that break these rules.)");
    m.def("attention_backward", &py_attention_backward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dout"_a,
          "dq"_a, "dk"_a, "dv"_a, py::kw_only(), "scale"_a, "causal"_a = true, "dropout"_a = 0.0,
          "seed"_a = 0,
          R"(Writes dq, dk and dv, the gradients of attention_forward for dout, the gradient of its output.

out and lse are what attention_forward wrote; its rules for shapes and types hold here too. The probabilities are
recomputed from lse, tile by tile: the extra memory is O(T_k * head_dim) a thread.)");
    m.def("attention_cached", &py_attention_cached, "q"_a, "k"_a, "v"_a, "keys"_a, "values"_a, "offsets"_a,
          "out"_a, py::kw_only(), "scale"_a,
          R"(Appends k and v to a cache of keys and values, and writes out, the attention of q over it.

q, k, v, out: (B, n_head, T, head_dim) float32, T new positions of each sequence; keys, values: (B, n_head, capacity,
head_dim) in any storage; offsets: (B,) int32, the positions of each sequence that the cache already has. Position i of
sequence b sees positions 0 .. offsets[b] + i. Raises ValueError if the cache has no room for T more.)");
    m.def("dropout_mask", &py_dropout_mask, "mask"_a, "dropout"_a, "seed"_a,
          "Writes the factors 0 or 1 / (1 - dropout) that attention uses. mask: (B, n_head, T_q, T_k), "
          "contiguous.");
}

}  // namespace mlxgpt
