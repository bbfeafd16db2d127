// Activation functions, element by element.
#pragma once

#include <string>

#include "kernels/table.h"

namespace mlxgpt {

/// The activation function of this name with the kernels in use. Throws std::invalid_argument with the known
/// names if there is none.
const Activation& activation_named(const std::string& name);

/// out = f(x), each (rows, n).
void activation_forward(int rows, int n, Rows x, const Activation& f, Rows out);

/// dx *= f'(x), in place, each (rows, n).
void activation_backward(int rows, int n, Rows x, const Activation& f, Rows dx);

}  // namespace mlxgpt
