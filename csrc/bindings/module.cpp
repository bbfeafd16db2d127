// The Python module mlxgpt._core: what runs where, and recordings. The operations are bound in bind_*.cpp:
// each binding checks its arguments, releases the GIL, and calls its operation in ops/.
#include <pybind11/pybind11.h>

#include <chrono>
#include <numeric>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "bindings/recording.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace mlxgpt {
namespace {

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

void bind_recording(py::module_& m) {
    py::class_<Recording>(m, "Recording",
                          R"(The kernel calls made in a with statement, which replay() makes again.

Records linear_forward, gelu_forward, layer_norm_forward, embedding_forward and attention_cached. The recording keeps
their arrays alive, and a replay reads and writes these arrays again: to replay with other ids or offsets, change them
in place. A thread makes one recording at a time.)")
        .def(py::init<>())
        .def(
            "__enter__",
            [](Recording& self) -> Recording& {
                self.start();
                return self;
            },
            py::return_value_policy::reference)
        .def("__exit__", [](Recording& self, const py::args&) { self.stop(); })
        .def("replay", &Recording::replay, "Makes the recorded calls again, in order.")
        .def("__len__", &Recording::size);
}

}  // namespace
}  // namespace mlxgpt

PYBIND11_MODULE(_core, m) {
    using namespace mlxgpt;
    using namespace py::literals;
    m.doc() =
        R"(The CPU kernels of mlxgpt.

Arrays are float32 and export the buffer protocol. Those of attention, and weights that get no gradient, may also be
float16, or the bits of bfloat16 in uint16; weights may also be quantized.)";
    m.attr("__version__") = MLXGPT_VERSION;
    m.def(
        "isa", [] { return kernels().name; },
        "The instruction set in use. The environment variable MLXGPT_ISA overrides the choice.");
    m.def("num_threads", &num_threads,
          "The number of threads that work on one call. MLXGPT_NUM_THREADS overrides the choice.");
    m.def("fma_peak", &py_fma_peak, "n"_a = 5000000,
          "The GFLOP/s that all threads reach together with multiply-adds alone, n for each register of a "
          "block.");
    m.def("_vector_math", &py_vector_math, "name"_a, "x"_a, "out"_a,
          "out = f(x) for a function f of csrc/kernels/vector_math.h, for tests.");
    bind_attention(m);
    bind_layers(m);
    bind_training(m);
    bind_copy(m);
    bind_recording(m);
}
