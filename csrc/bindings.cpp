// The Python module mlxgpt._core: checks arguments, releases the GIL, calls. The only file that knows
// Python. Arrays come as anything that exports a buffer: NumPy arrays, MLX arrays, memoryviews.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "parallel.h"

namespace py = pybind11;

namespace mlxgpt {
namespace {

enum class Access { kRead, kWrite };

template <class List>
std::string shape_text(const List& shape) {
    std::string text;
    for (const auto n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
    return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

[[noreturn]] void fail(const std::string& where, const std::string& what) {
    throw std::invalid_argument(where + ": " + what);
}

/// A float32 array argument and its name, for messages.
struct Array {
    std::string where, name;
    py::buffer_info info;

    Array(const char* where_, const char* name_, const py::buffer& buffer, Access access)
        : where(where_), name(name_), info(buffer.request()) {
        // '=' is native order too; NumPy writes it for arrays that are not aligned.
        if ((info.format != "f" && info.format != "=f") || info.itemsize != 4)
            fail(where, name + " has buffer format '" + info.format + "', expected float32 ('f')");
        if (access == Access::kWrite && info.readonly)
            fail(where, name + " is read-only, expected a writable array");
        if (reinterpret_cast<uintptr_t>(info.ptr) % alignof(float) != 0)
            fail(where, name + " does not begin on a multiple of 4 bytes");
        for (const auto stride : info.strides)
            if (stride % 4 != 0)
                fail(where, name + " has a stride of " + std::to_string(stride) +
                                " bytes, expected a multiple of 4");
        if (access == Access::kWrite) check_distinct_elements();
    }

    // Sorted by stride, each axis must step past all that the smaller ones span.
    void check_distinct_elements() const {
        std::vector<std::pair<py::ssize_t, py::ssize_t>> axes;
        for (size_t axis = 0; axis < info.shape.size(); ++axis)
            if (info.shape[axis] > 1) axes.emplace_back(std::abs(info.strides[axis]), info.shape[axis]);
        std::sort(axes.begin(), axes.end());
        py::ssize_t span = 4;
        for (const auto& [stride, n] : axes) {
            if (stride < span) fail(where, name + " has elements that share memory, expected distinct ones");
            span = stride * (n - 1) + span;
        }
    }

    void expect_shape(std::initializer_list<py::ssize_t> shape, const std::string& text) const {
        if (!std::equal(info.shape.begin(), info.shape.end(), shape.begin(), shape.end()))
            fail(where, name + " is " + shape_text(info.shape) + ", expected " + text);
    }
    void expect_shape(std::initializer_list<py::ssize_t> shape) const {
        expect_shape(shape, shape_text(shape));
    }

    Tensor4 tensor() const {
        if (info.shape[3] > 1 && info.strides[3] != 4)
            fail(where, name + " has a stride of " + std::to_string(info.strides[3] / 4) +
                            " elements along its last axis, expected 1");
        return {static_cast<float*>(info.ptr), info.strides[0] / 4, info.strides[1] / 4, info.strides[2] / 4};
    }

    float* contiguous() const {
        py::ssize_t stride = 4;
        for (size_t axis = info.shape.size(); axis-- > 0; stride *= info.shape[axis])
            if (info.shape[axis] > 1 && info.strides[axis] != stride)
                fail(where, name + " is not contiguous");
        return static_cast<float*>(info.ptr);
    }
};

void expect_distinct(const Array& a, std::initializer_list<const Array*> others) {
    for (const Array* b : others)
        if (a.info.ptr == b->info.ptr) fail(a.where, a.name + " and " + b->name + " share memory");
}

constexpr int kMostHeadDim = 256;

void check_sizes(const Array& array) {
    for (const auto n : array.info.shape)
        if (n < 1 || n > INT32_MAX)
            fail(array.where,
                 array.name + " is " + shape_text(array.info.shape) + ", expected sizes of at least 1");
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
    check_sizes(q);
    const auto B = q.info.shape[0], n_head = q.info.shape[1], T_q = q.info.shape[2], D = q.info.shape[3];
    if (D > kMostHeadDim)
        fail(where, "q is " + shape_text(q.info.shape) + ", expected a head_dim of at most " +
                        std::to_string(kMostHeadDim));
    const py::ssize_t T_k = k.info.ndim == 4 ? k.info.shape[2] : 0;
    k.expect_shape({B, n_head, T_k, D}, "(" + std::to_string(B) + ", " + std::to_string(n_head) + ", T_k, " +
                                            std::to_string(D) + ")");
    check_sizes(k);
    v.expect_shape({B, n_head, T_k, D});
    if (T_q > T_k)
        fail(where, "q has " + std::to_string(T_q) + " positions and k has " + std::to_string(T_k) +
                        ", expected T_q <= T_k");
    out.expect_shape({B, n_head, T_q, D});
    lse.expect_shape({B, n_head, T_q});
    if (B * n_head > INT32_MAX)
        fail(where, "q is " + shape_text(q.info.shape) + ", expected B * n_head below 2^31");
    if (!std::isfinite(scale))
        fail(where, "scale is " + std::to_string(scale) + ", expected a finite number");

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
    expect_distinct(out, {&q, &k, &v, &lse});
    expect_distinct(lse, {&q, &k, &v});
    const py::gil_scoped_release release;
    attention_forward(call);
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
    expect_distinct(dq, {&q, &k, &v, &out, &lse, &dout, &dk, &dv});
    expect_distinct(dk, {&q, &k, &v, &out, &lse, &dout, &dv});
    expect_distinct(dv, {&q, &k, &v, &out, &lse, &dout});
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
    check_sizes(mask);
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

}  // namespace
}  // namespace mlxgpt

PYBIND11_MODULE(_core, m) {
    using namespace mlxgpt;
    using namespace py::literals;
    m.doc() = "CPU kernels of mlxgpt. Arrays are float32 and export the buffer protocol.";
    m.attr("__version__") = MLXGPT_VERSION;

    m.def(
        "isa", [] { return kernels().name; },
        "The instruction set in use: scalar, avx2, avx512 or neon. MLXGPT_ISA overrides the choice.");
    m.def("num_threads", &num_threads,
          "Threads that work on one call. MLXGPT_NUM_THREADS overrides the choice.");

    m.def("attention_forward", &py_attention_forward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, py::kw_only(),
          "scale"_a, "causal"_a = true, "dropout"_a = 0.0, "seed"_a = 0,
          R"(out = softmax(scale * q k^T) v, and lse, the log of the sum of each query's exponentials.

q, out: (B, n_head, T_q, head_dim); k, v: (B, n_head, T_k, head_dim) with T_q <= T_k and head_dim <= 256;
any strides with a contiguous last axis. lse: (B, n_head, T_q), contiguous. out and lse are written.
If causal, query i sees keys 0 .. i + T_k - T_q. Each probability is dropped with chance `dropout`, by a
mask that depends on (seed, batch, head, query, key) alone. Raises ValueError for arguments that break
these rules.)");
    m.def("attention_backward", &py_attention_backward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dout"_a,
          "dq"_a, "dk"_a, "dv"_a, py::kw_only(), "scale"_a, "causal"_a = true, "dropout"_a = 0.0,
          "seed"_a = 0,
          R"(Writes dq, dk, dv, the gradients of attention_forward for the output gradient dout.

out and lse are the forward's; shapes and rules are too. Probabilities are computed again from lse, tile
by tile: the extra memory is O(T_k * head_dim) a thread.)");
    m.def("dropout_mask", &py_dropout_mask, "mask"_a, "dropout"_a, "seed"_a,
          "Writes the factors 0 or 1 / (1 - dropout) that attention uses: mask is (B, n_head, T_q, T_k), "
          "contiguous.");
}
