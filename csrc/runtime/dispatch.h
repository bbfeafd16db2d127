// Picks the kernels for this processor.
#pragma once

#include <vector>

#include "kernels/table.h"

namespace mlxgpt {

/// The best kernels that were built and that the processor runs, or those that the environment
/// variable MLXGPT_ISA names. Looked up once. Throws std::invalid_argument if that variable names none.
const Kernels& kernels();

/// All kernels that were built and that the processor runs, best first.
std::vector<const Kernels*> usable_kernels();

}  // namespace mlxgpt
