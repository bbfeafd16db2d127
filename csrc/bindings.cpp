// The Python module mlxgpt._core: checks arguments, releases the GIL, calls. The only file that knows
// Python. Arrays come as anything that exports a buffer: NumPy arrays, MLX arrays, memoryviews.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <initializer_list>
#include <numeric>
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

/// An array argument and its name, for messages.
struct Array {
    std::string where, name;
    py::buffer_info info;
    Storage storage = Storage::kFloat32;

    Array(const char* where_, const char* name_, const py::buffer& buffer, Access access)
        : where(where_), name(name_), info(buffer.request()) {
        // The last letter is the type; NumPy puts '=', native order, before it for unaligned arrays. The
        // buffer protocol has no bfloat16: it comes as its bits in uint16.
        const std::string letter = info.format.substr(info.format.find_first_not_of("=@"));
        if (letter == "H")
            storage = Storage::kBFloat16;
        else if (letter == "e")
            storage = Storage::kFloat16;
        else if (letter != "f")
            fail(where, name + " has buffer format '" + info.format +
                            "', expected float32 ('f'), float16 ('e') or bfloat16 bits in uint16 ('H')");
        if (access == Access::kWrite && info.readonly)
            fail(where, name + " is read-only, expected a writable array");
        const auto multiple = " a multiple of " + std::to_string(info.itemsize) + " bytes";
        if (reinterpret_cast<uintptr_t>(info.ptr) % info.itemsize != 0)
            fail(where, name + " does not begin on" + multiple);
        for (const auto stride : info.strides)
            if (stride % info.itemsize != 0)
                fail(where,
                     name + " has a stride of " + std::to_string(stride) + " bytes, expected" + multiple);
        if (access == Access::kWrite) check_distinct_elements();
    }

    // Sorted by stride, each axis must step past all that the smaller ones span.
    void check_distinct_elements() const {
        std::vector<std::pair<py::ssize_t, py::ssize_t>> axes;
        for (size_t axis = 0; axis < info.shape.size(); ++axis)
            if (info.shape[axis] > 1) axes.emplace_back(std::abs(info.strides[axis]), info.shape[axis]);
        std::sort(axes.begin(), axes.end());
        py::ssize_t span = info.itemsize;
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

    void expect_storage(const Array& like) const {
        if (storage != like.storage)
            fail(where, name + " has buffer format '" + info.format + "', expected that of " + like.name +
                            ", '" + like.info.format + "'");
    }

    Tensor4 tensor() const {
        const py::ssize_t size = info.itemsize;
        if (info.shape[3] > 1 && info.strides[3] != size)
            fail(where, name + " has a stride of " + std::to_string(info.strides[3] / size) +
                            " elements along its last axis, expected 1");
        return {info.ptr, storage, info.strides[0] / size, info.strides[1] / size, info.strides[2] / size};
    }

    float* contiguous_float32() const {
        if (storage != Storage::kFloat32)
            fail(where, name + " has buffer format '" + info.format + "', expected float32 ('f')");
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
constexpr int kMostSize = 1 << 30;  // so that sums of sizes fit an int

void check_sizes(const Array& array) {
    for (const auto n : array.info.shape)
        if (n < 1 || n > kMostSize)
            fail(array.where, array.name + " is " + shape_text(array.info.shape) +
                                  ", expected sizes from 1 to " + std::to_string(kMostSize));
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
    call.lse = lse.contiguous_float32();
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
    for (const Array* array : {&dout, &dq, &dk, &dv}) array->expect_storage(q);
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
    float* data = mask.contiguous_float32();
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

}  // namespace
}  // namespace mlxgpt

PYBIND11_MODULE(_core, m) {
    using namespace mlxgpt;
    using namespace py::literals;
    m.doc() =
        "CPU kernels of mlxgpt. Arrays export the buffer protocol, in float32, float16, or bfloat16 as "
        "uint16.";
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
any strides with a contiguous last axis; float32, float16, or the bits of bfloat16 in uint16, all alike.
lse: (B, n_head, T_q), float32, contiguous. Arithmetic is in float32. out and lse are written.
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
    m.def(
        "fma_peak", &py_fma_peak, "n"_a = 5000000,
        "GFLOP/s that all threads reach with n multiply-adds in each register of a block and nothing else.");
}
