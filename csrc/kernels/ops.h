// The table of the kernels beside attention.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

#include <string.h>

#include "adamw.h"
#include "cross_entropy.h"
#include "elementwise.h"
#include "gelu.h"
#include "layer_norm.h"
#include "math.h"

namespace {

bool vector_math(const char* name, const float* x, ptrdiff_t n, float* out) {
    const auto apply = [&](auto function) {
        for_vectors(n, [&](ptrdiff_t i, auto some) { some.write(out + i, function(some.read(x + i))); });
        return true;
    };
    if (strcmp(name, "exp2_nonpositive") == 0) return apply([](Vec a) { return exp2_nonpositive(a); });
    if (strcmp(name, "tanh") == 0) return apply([](Vec a) { return tanh(a); });
    if (strcmp(name, "erf") == 0) return apply([](Vec a) { return erf(a); });
    if (strcmp(name, "log") == 0) return apply([](Vec a) { return log(a); });
    return false;
}

const mlxgpt::OpKernels op_kernels = {
    add_bias,
    bias_gelu,
    gelu_backward,
    add_columns,
    add,
    scale,
    layer_norm_forward,
    layer_norm_backward,
    add_rows,
    cross_entropy,
    squares,
    adamw,
    dropout,
    vector_math,
};

}  // namespace
