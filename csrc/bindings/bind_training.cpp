// The loss and the optimizer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "ops/adamw.h"
#include "ops/cross_entropy.h"

namespace mlxgpt {
namespace {

double py_linear_cross_entropy(const py::buffer& x_, const py::buffer& weight_, const py::buffer& targets_,
                               const MaybeBuffer& dx_, const MaybeBuffer& dweight_, bool accumulate,
                               double scale, const MaybeBuffer& scales_, const MaybeBuffer& biases_) {
    const char* where = "linear_cross_entropy";
    const Array x(where, "x", x_, Access::kRead), weight(where, "weight", weight_, Access::kRead, kWeights);
    const MaybeArray scales(where, "scales", scales_, Access::kRead),
        biases(where, "biases", biases_, Access::kRead), dx(where, "dx", dx_, Access::kWrite),
        dweight(where, "dweight", dweight_, Access::kWrite);
    const Ids targets(where, "targets", targets_);
    expect_axes(x, 2, "(N, C)");
    expect_axes(weight, 2, "(V, C)");
    LinearCrossEntropy call;
    const int N = call.N = x.size(0);
    const int C = call.C = x.size(1);
    const int V = call.V = weight.size(0);
    call.x = matrix(x);
    call.weight = weights_of(weight, scales, biases, V, C);
    if (dx || dweight) weight.expect_float32();
    targets.expect_length(N);
    call.targets = targets.within(-1, V);
    call.dx = matrix(dx, N, C);
    call.dweight = matrix(dweight, V, C);
    call.accumulate = accumulate;
    call.scale = static_cast<float>(scale);
    expect_finite(where, "scale", scale);
    expect_distinct({dx, dweight}, {&x, &weight, scales, biases, &targets});
    const py::gil_scoped_release release;
    return linear_cross_entropy(call);
}

int py_cross_entropy_rows(int n_rows, int vocab_size) {
    for (const auto& [name, value] :
         {std::pair<const char*, int>{"n_rows", n_rows}, {"vocab_size", vocab_size}})
        if (value < 1)
            fail("cross_entropy_rows", name + (" is " + std::to_string(value)) + ", expected 1 or more");
    return cross_entropy_rows(n_rows, vocab_size);
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
    std::vector<Extent> extents;
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
            extents.push_back(
                {static_cast<float*>(array->info.ptr), array->info.size, array->name, array != &gradient});
    }
    expect_distinct(where, std::move(extents));
    const py::gil_scoped_release release;
    return adamw(tensors, {learning_rate, beta1, beta2, eps, weight_decay, step, max_norm});
}

}  // namespace

void bind_training(py::module_& m) {
    using namespace py::literals;
    m.def(
        "linear_cross_entropy", &py_linear_cross_entropy, "x"_a, "weight"_a, "targets"_a,
        "dx"_a.none(true) = py::none(), "dweight"_a.none(true) = py::none(), py::kw_only(),
        "accumulate"_a = false, "scale"_a = 1.0, "scales"_a = py::none(), "biases"_a = py::none(),
        R"(Returns the mean of -log softmax(x weight^T)[target] over the targets that are not -1, or 0 if all are.

x: (N, C); weight: (V, C); targets: (N,) int32. Writes scale times the gradients of the mean to dx and dweight, unless
they are None; with accumulate, dweight is added to. The logits exist for cross_entropy_rows(N, V) rows at a time.
Without gradients, weight may be in any storage that linear_forward takes.)");
    m.def("cross_entropy_rows", &py_cross_entropy_rows, "n_rows"_a, "vocab_size"_a,
          "The number of rows whose logits linear_cross_entropy holds at the same time.");
    m.def(
        "adamw", &py_adamw, "parameters"_a, "gradients"_a, "m"_a, "v"_a, "decayed"_a, py::kw_only(),
        "learning_rate"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "step"_a, "max_norm"_a,
        R"(Takes a step of AdamW with bias correction, in place, and returns the norm of all gradients together.

Gradients are multiplied by min(1, max_norm / (norm + 1e-6)) first, unless max_norm is 0. Parameters marked in
`decayed` are multiplied by 1 - learning_rate * weight_decay. step counts from 1. If the norm is not finite, nothing is
written.)");
}

}  // namespace mlxgpt
