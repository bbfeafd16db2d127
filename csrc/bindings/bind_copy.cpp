// Copies of weights out of a mapped file.
#include <pybind11/pybind11.h>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "ops/copy.h"

namespace mlxgpt {
namespace {

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

}  // namespace

void bind_copy(py::module_& m) {
    using namespace py::literals;
    m.def("copy", &py_copy, "x"_a, "out"_a,
          R"(Copies x to out, (n,) or (rows, columns), and returns whether every value is finite.

x may begin at any address, as it does in a mapped file, and one of its axes has a stride of 1. out is contiguous, and
of x's type or float32.)");
}

}  // namespace mlxgpt
