#include "ops/activation.h"

#include <stdexcept>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "runtime/split.h"

namespace mlxgpt {

const Activation& activation_named(const std::string& name) {
    const Kernels& isa = kernels();
    std::string known;
    for (int i = 0; i < isa.n_activations; ++i) {
        const Activation& activation = isa.activations[i];
        if (name == activation.name) return activation;
        known += (known.empty() ? "'" : " or '") + std::string(activation.name) + "'";
    }
    throw std::invalid_argument("activation is '" + name + "', expected " + known);
}

void activation_forward(int rows, int n, Rows x, const Activation& f, Rows out) {
    parallel_rows(rows, n, [&](Range part) {
        f.forward(x.from(part.begin), static_cast<int>(part.size), n, nullptr, out.from(part.begin));
    });
}

void activation_backward(int rows, int n, Rows x, const Activation& f, Rows dx) {
    parallel_rows(rows, n, [&](Range part) {
        f.backward(x.from(part.begin), static_cast<int>(part.size), n, dx.from(part.begin), {});
    });
}

}  // namespace mlxgpt
