// Chooses the kernels for this processor.
#pragma once

#include <vector>

#include "kernels/table.h"

namespace mlxgpt {

/// The best kernels that this processor runs, or those of the instruction set that the environment variable
/// MLXGPT_ISA names. Chosen once. Throws std::invalid_argument if the processor does not run those, or the
/// variable names no instruction set.
const Kernels& kernels();

/// All kernels that this processor runs, best first.
std::vector<const Kernels*> usable_kernels();

}  // namespace mlxgpt
