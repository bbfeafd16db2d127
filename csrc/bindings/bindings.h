// The parts of the Python module, each of which defines functions in it.
#pragma once

#include <pybind11/pybind11.h>

namespace mlxgpt {

void bind_attention(pybind11::module_& m);
void bind_layers(pybind11::module_& m);
void bind_training(pybind11::module_& m);
void bind_copy(pybind11::module_& m);

}  // namespace mlxgpt
