// The layers: linear, activation, layer norm, embedding, dropout.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "bindings/recording.h"
#include "ops/activation.h"
#include "ops/dropout.h"
#include "ops/embedding.h"
#include "ops/layer_norm.h"
#include "ops/linear.h"

namespace mlxgpt {
namespace {

const Activation& activation_argument(const char* where, const std::string& name) {
    try {
        return activation_named(name);
    } catch (const std::invalid_argument& error) {
        fail(where, error.what());
    }
}

// ---- linear ----

void py_linear_forward(const py::buffer& x_, const py::buffer& weight_, const MaybeBuffer& bias_,
                       const py::buffer& out_, const MaybeBuffer& residual_, const MaybeBuffer& activated_,
                       const std::string& activation, double scale, const MaybeBuffer& scales_,
                       const MaybeBuffer& biases_) {
    const char* where = "linear";
    Array x(where, "x", x_, Access::kRead), weight(where, "weight", weight_, Access::kRead, kWeights),
        out(where, "out", out_, Access::kWrite);
    MaybeArray scales(where, "scales", scales_, Access::kRead),
        biases(where, "biases", biases_, Access::kRead), bias(where, "bias", bias_, Access::kRead),
        residual(where, "residual", residual_, Access::kRead),
        activated(where, "activated", activated_, Access::kWrite);
    expect_axes(x, 2, "(rows, n_in)");
    expect_axes(out, 2, "(rows, n_out)");
    expect_distinct({&out, activated}, {&x, &weight, scales, biases, bias, residual});
    LinearForward call;
    call.rows = x.size(0);
    call.n_in = x.size(1);
    call.n_out = out.size(1);
    call.x = matrix(x);
    call.weight = weights_of(weight, scales, biases, call.n_out, call.n_in);
    call.scale = static_cast<float>(scale);
    expect_finite(where, "scale", scale);
    call.bias = contiguous(bias, {call.n_out});
    call.out = matrix(out, call.rows, call.n_out);
    call.residual = matrix(residual, call.rows, call.n_out);
    call.activated = matrix(activated, call.rows, call.n_out);
    call.activation = &activation_argument(where, activation);
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
    const Array dout(where, "dout", dout_, Access::kRead), weight(where, "weight", weight_, Access::kRead);
    const MaybeArray x(where, "x", x_, Access::kRead), pre(where, "pre", pre_, Access::kRead),
        dx(where, "dx", dx_, Access::kWrite), dweight(where, "dweight", dweight_, Access::kWrite),
        dbias(where, "dbias", dbias_, Access::kWrite),
        activated(where, "activated", activated_, Access::kWrite);
    expect_axes(dout, 2, "(rows, n_out)");
    expect_axes(weight, 2, "(n_out, n_in)");
    LinearBackward call;
    const int rows = call.rows = dout.size(0);
    const int n_out = call.n_out = dout.size(1);
    const int n_in = call.n_in = weight.size(1);
    call.dout = matrix(dout);
    call.x = matrix(x, rows, n_in);
    call.weight = matrix(weight, n_out, n_in);
    call.dx = matrix(dx, rows, n_in);
    call.dweight = matrix(dweight, n_out, n_in);
    call.dbias = contiguous(dbias, {n_out});
    call.accumulate = accumulate;
    call.pre = matrix(pre, rows, n_in);
    call.activated = matrix(activated, rows, n_in);
    call.activation = &activation_argument(where, activation);
    if (dweight && !x) fail(where, "dweight is given without x");
    if (pre && !dx) fail(where, "pre is given without dx");
    if (activated && !pre) fail(where, "activated is given without pre");
    if (activated && dweight) fail(where, "activated is given with dweight, expected a call for each");
    expect_distinct({dx, dweight, dbias, activated}, {&dout, x, &weight, pre});
    const py::gil_scoped_release release;
    linear_backward(call);
}

// ---- activation ----

void py_gelu_forward(const py::buffer& x_, const py::buffer& out_, const std::string& activation) {
    const char* where = "gelu";
    Array x(where, "x", x_, Access::kRead), out(where, "out", out_, Access::kWrite);
    expect_axes(x, 2, "(rows, n)");
    const int rows = x.size(0), n = x.size(1);
    expect_distinct({&out}, {&x});
    const Rows from = matrix(x), to = matrix(out, rows, n);
    const Activation& f = activation_argument(where, activation);
    Recording::run([=, &f] { activation_forward(rows, n, from, f, to); }, std::move(x), std::move(out));
}

void py_gelu_backward(const py::buffer& x_, const py::buffer& dx_, const std::string& activation) {
    const char* where = "gelu backward";
    const Array x(where, "x", x_, Access::kRead), dx(where, "dx", dx_, Access::kWrite);
    expect_axes(x, 2, "(rows, n)");
    const int rows = x.size(0), n = x.size(1);
    expect_distinct({&dx}, {&x});
    const Rows from = matrix(x), gradient = matrix(dx, rows, n);
    const Activation& f = activation_argument(where, activation);
    const py::gil_scoped_release release;
    activation_backward(rows, n, from, f, gradient);
}

// ---- layer norm ----

void py_layer_norm_forward(const py::buffer& x_, const py::buffer& weight_, const MaybeBuffer& bias_,
                           float eps, const py::buffer& out_, const py::buffer& mean_,
                           const py::buffer& rstd_) {
    const char* where = "layer_norm";
    Array x(where, "x", x_, Access::kRead), weight(where, "weight", weight_, Access::kRead),
        out(where, "out", out_, Access::kWrite), mean(where, "mean", mean_, Access::kWrite),
        rstd(where, "rstd", rstd_, Access::kWrite);
    MaybeArray bias(where, "bias", bias_, Access::kRead);
    expect_axes(x, 2, "(rows, C)");
    const int rows = x.size(0), C = x.size(1);
    if (!(eps >= 0) || !std::isfinite(eps))
        fail(where, "eps is " + std::to_string(eps) + ", expected 0 or more");
    const float *from = x.contiguous(), *w = weight.contiguous({C}), *b = contiguous(bias, {C});
    float *to = out.contiguous({rows, C}), *m = mean.contiguous({rows}), *r = rstd.contiguous({rows});
    expect_distinct({&out, &mean, &rstd}, {&x, &weight, bias});
    Recording::run([=] { layer_norm_forward(rows, C, from, w, b, eps, to, m, r); }, std::move(x),
                   std::move(weight), std::move(bias), std::move(out), std::move(mean), std::move(rstd));
}

void py_layer_norm_backward(const py::buffer& dout_, const py::buffer& x_, const py::buffer& weight_,
                            const py::buffer& mean_, const py::buffer& rstd_, const py::buffer& dx_,
                            const MaybeBuffer& dweight_, const MaybeBuffer& dbias_, bool add_to_dx,
                            bool accumulate) {
    const char* where = "layer_norm backward";
    const Array dout(where, "dout", dout_, Access::kRead), x(where, "x", x_, Access::kRead),
        weight(where, "weight", weight_, Access::kRead), mean(where, "mean", mean_, Access::kRead),
        rstd(where, "rstd", rstd_, Access::kRead), dx(where, "dx", dx_, Access::kWrite);
    const MaybeArray dweight(where, "dweight", dweight_, Access::kWrite),
        dbias(where, "dbias", dbias_, Access::kWrite);
    expect_axes(x, 2, "(rows, C)");
    const int rows = x.size(0), C = x.size(1);
    LayerNormBackward call{};
    call.rows = rows;
    call.n = C;
    call.dout = dout.contiguous({rows, C});
    call.x = x.contiguous();
    call.weight = weight.contiguous({C});
    call.mean = mean.contiguous({rows});
    call.rstd = rstd.contiguous({rows});
    call.dx = dx.contiguous({rows, C});
    call.dweight = contiguous(dweight, {C});
    call.dbias = contiguous(dbias, {C});
    call.add_to_dx = add_to_dx;
    call.accumulate = accumulate;
    expect_distinct({&dx, dweight, dbias}, {&dout, &x, &weight, &mean, &rstd});
    const py::gil_scoped_release release;
    layer_norm_backward(call);
}

// ---- embedding ----

void py_embedding_forward(const py::buffer& ids_, const py::buffer& tokens_, const MaybeBuffer& positions_,
                          const py::buffer& out_, const MaybeBuffer& offsets_, const MaybeBuffer& scales_,
                          const MaybeBuffer& biases_) {
    const char* where = "embedding";
    Ids ids(where, "ids", ids_);
    Array tokens(where, "tokens", tokens_, Access::kRead, kWeights), out(where, "out", out_, Access::kWrite);
    MaybeArray scales(where, "scales", scales_, Access::kRead),
        biases(where, "biases", biases_, Access::kRead),
        positions(where, "positions", positions_, Access::kRead);
    std::optional<Ids> offsets;
    if (offsets_) offsets.emplace(where, "offsets", *offsets_);
    expect_axes(tokens, 2, "(V, C)");
    expect_axes(ids, 2, "(B, T)");
    expect_axes(out, 3, "(B, T, C)");
    const int V = tokens.size(0);
    EmbeddingForward call;
    call.B = ids.size(0);
    call.T = ids.size(1);
    call.C = out.size(2);
    const Values rows = ids.values();
    call.ids = rows.data;
    call.tokens = weights_of(tokens, scales, biases, V, call.C);
    call.out = out.contiguous({call.B, call.T, call.C});
    Values firsts;
    int n_firsts = 0;
    if (offsets) {
        if (!positions) fail(where, "offsets is given without positions");
        expect_axes(*positions.array, 2, "(n_positions, C)");
        offsets->expect_length(call.B);
        const int n_positions = positions->size(0);
        call.positions = positions->contiguous({n_positions, call.C});
        firsts = offsets->values();
        n_firsts = n_positions - call.T + 1;
        call.offsets = firsts.data;
    } else {
        call.positions = contiguous(positions, {call.T, call.C});
    }
    expect_distinct({&out}, {&ids, &tokens, scales, biases, positions, offsets ? &*offsets : nullptr});
    Recording::run(
        [=] {  // checks the values each time, as they change between replays
            rows.expect_within(0, V);
            firsts.expect_within(0, n_firsts, "offset");
            embedding_forward(call);
        },
        std::move(ids), std::move(tokens), std::move(scales), std::move(biases), std::move(positions),
        std::move(out), std::move(offsets));
}

void py_embedding_backward(const py::buffer& ids_, const py::buffer& dout_, const MaybeBuffer& dtokens_,
                           const MaybeBuffer& dpositions_) {
    const char* where = "embedding backward";
    const Ids ids(where, "ids", ids_);
    const Array dout(where, "dout", dout_, Access::kRead);
    const MaybeArray dtokens(where, "dtokens", dtokens_, Access::kWrite),
        dpositions(where, "dpositions", dpositions_, Access::kWrite);
    expect_axes(ids, 2, "(B, T)");
    expect_axes(dout, 3, "(B, T, C)");
    const int B = ids.size(0), T = ids.size(1), C = dout.size(2);
    const float* from = dout.contiguous({B, T, C});
    const int V = dtokens && dtokens->info.ndim == 2 ? dtokens->size(0) : INT32_MAX;
    float *tokens = contiguous(dtokens, {V, C}), *positions = contiguous(dpositions, {T, C});
    const int32_t* rows = ids.within(0, V);
    expect_distinct({dtokens, dpositions}, {&ids, &dout});
    const py::gil_scoped_release release;
    embedding_backward(B, T, C, rows, from, tokens, positions);
}

// ---- dropout ----

void py_dropout(const py::buffer& x_, const MaybeBuffer& residual_, double p, uint64_t seed,
                const py::buffer& out_) {
    const char* where = "dropout";
    Array x(where, "x", x_, Access::kRead), out(where, "out", out_, Access::kWrite);
    MaybeArray residual(where, "residual", residual_, Access::kRead);
    if (!(p >= 0.0 && p < 1.0)) fail(where, "p is " + std::to_string(p) + ", expected 0 <= p < 1");
    for (const Array* other : {static_cast<const Array*>(residual), static_cast<const Array*>(&out)})
        if (other != nullptr && other->info.shape != x.info.shape)
            fail(where, other->name + " is " + shape_text(other->info.shape) + ", expected " +
                            shape_text(x.info.shape));
    const float *from = x.contiguous(), *more = residual ? residual->contiguous() : nullptr;
    float* to = out.contiguous();
    const auto n = static_cast<ptrdiff_t>(x.info.size);
    expect_distinct({&out}, {&x, residual});
    Recording::run([=] { dropout(n, from, more, static_cast<float>(p), seed, to); }, std::move(x),
                   std::move(residual), std::move(out));
}

}  // namespace

void bind_layers(py::module_& m) {
    using namespace py::literals;
    m.def(
        "linear_forward", &py_linear_forward, "x"_a, "weight"_a, "bias"_a.none(true), "out"_a, py::kw_only(),
        "residual"_a = py::none(), "activated"_a = py::none(), "activation"_a = "gelu_new", "scale"_a = 1.0,
        "scales"_a = py::none(), "biases"_a = py::none(),
        R"(Writes out = scale x weight^T + bias + residual, or out = scale x weight^T + bias and activated = f(out).

x: (rows, n_in); weight: (n_out, n_in); bias: (n_out,); out, residual, activated: (rows, n_out). There may be gaps
between rows. f is the activation: gelu_new, GPT-2's tanh form, or gelu, the exact form.

weight may be float32, float16, the bits of bfloat16 in uint16, or quantized in the layout of mx.quantize with 4 or 8
bits: words in uint32, (n_out, n_in * bits / 32), with scales and biases (n_out, n_in / group), of any of these three
types, for groups of 32, 64 or 128 elements. For few rows, x is then quantized too, to 16 bits, group by group.)");
    m.def("linear_backward", &py_linear_backward, "dout"_a, "x"_a.none(true), "weight"_a, "dx"_a.none(true),
          "dweight"_a.none(true), "dbias"_a.none(true), py::kw_only(), "accumulate"_a = false,
          "pre"_a = py::none(), "activated"_a = py::none(), "activation"_a = "gelu_new",
          R"(Writes dx = dout weight, dweight = dout^T x, and dbias = the sum of dout over rows.

A gradient that is None is not computed; without dweight, x may be None. With accumulate, dweight and dbias are added
to. With pre, x is the activation f(pre): dx becomes the gradient of pre, and f(pre) is recomputed into activated, if
given.)");
    m.def("gelu_forward", &py_gelu_forward, "x"_a, "out"_a, "activation"_a,
          "Writes out = f(x), each (rows, n); f is the activation, gelu_new or gelu.");
    m.def("gelu_backward", &py_gelu_backward, "x"_a, "dx"_a, "activation"_a,
          "dx *= f'(x): turns the gradient of gelu_forward's out, in place, into the gradient of x.");
    m.def("layer_norm_forward", &py_layer_norm_forward, "x"_a, "weight"_a, "bias"_a.none(true), "eps"_a,
          "out"_a, "mean"_a, "rstd"_a,
          R"(Writes out = (x - mean) * rstd * weight + bias, row by row, with rstd = 1 / sqrt(variance + eps).

x, out: (rows, C); weight, bias: (C,). mean and rstd, (rows,), are written for the backward pass.)");
    m.def("layer_norm_backward", &py_layer_norm_backward, "dout"_a, "x"_a, "weight"_a, "mean"_a, "rstd"_a,
          "dx"_a, "dweight"_a.none(true), "dbias"_a.none(true), py::kw_only(), "add_to_dx"_a = false,
          "accumulate"_a = false,
          R"(Writes dx, dweight and dbias. dweight and dbias may be None.

With add_to_dx, dx is added to; with accumulate, dweight and dbias are.)");
    m.def("embedding_forward", &py_embedding_forward, "ids"_a, "tokens"_a, "positions"_a.none(true), "out"_a,
          py::kw_only(), "offsets"_a = py::none(), "scales"_a = py::none(), "biases"_a = py::none(),
          R"(Writes out[b, t] = tokens[ids[b, t]] + positions[offsets[b] + t].

ids: (B, T) int32; tokens: (V, C), in any storage that linear_forward takes, with scales and biases if quantized;
positions: (n_positions, C) with offsets (B,) int32, or (T, C) without; out: (B, T, C).)");
    m.def("embedding_backward", &py_embedding_backward, "ids"_a, "dout"_a, "dtokens"_a.none(true),
          "dpositions"_a.none(true),
          "Adds dout (B, T, C) to the rows of dtokens (V, C) and dpositions (T, C).");
    m.def("dropout", &py_dropout, "x"_a, "residual"_a.none(true), "p"_a, "seed"_a, "out"_a,
          R"(Writes out = x * mask + residual. An element of the mask is 0 with chance p, else 1 / (1 - p).

The mask is a function of seed and position. The gradient of x is dropout(dout, None, p, seed, dx).)");
}

}  // namespace mlxgpt
