// Every activation function, with its kernels over rows. A new one is a function Vec -> Gate in a file of its
// own, and a line in the table below.
//
// Included by target_<isa>.cpp after its Vec.
#pragma once

#include "kernels/gelu.h"
#include "kernels/table.h"
#include "kernels/vector_loops.h"
#include "kernels/vector_math.h"

namespace {

using mlxgpt::Rows;

template <Gate (*g)(Vec)>
void activation_forward(Rows x, int n_rows, int n_cols, const float* bias, Rows out) {
    for (int i = 0; i < n_rows; ++i) {
        float* in = x.data + i * x.stride;
        float* to = out.data + i * out.stride;
        for_vectors(n_cols, [&](ptrdiff_t c, auto some) {
            Vec a = some.read(in + c);
            if (bias != nullptr) {
                a = a + some.read(bias + c);
                some.write(in + c, a);
            }
            some.write(to + c, a * g(a).value);
        });
    }
}

template <Gate (*g)(Vec)>
void activation_backward(Rows x, int n_rows, int n_cols, Rows dout, Rows out) {
    for (int i = 0; i < n_rows; ++i) {
        const float* in = x.data + i * x.stride;
        float* gradient = dout.data + i * dout.stride;
        float* to = out.data == nullptr ? nullptr : out.data + i * out.stride;
        for_vectors(n_cols, [&](ptrdiff_t c, auto some) {
            const Vec a = some.read(in + c);
            const Gate gate = g(a);
            if (to != nullptr) some.write(to + c, a * gate.value);
            some.write(gradient + c, some.read(gradient + c) * (gate.value + gate.slope));
        });
    }
}

template <Gate (*g)(Vec)>
constexpr mlxgpt::Activation activation(const char* name) {
    return {name, activation_forward<g>, activation_backward<g>};
}

constexpr mlxgpt::Activation activations[] = {
    activation<gelu_new>("gelu_new"),
    activation<gelu>("gelu"),
};

}  // namespace
