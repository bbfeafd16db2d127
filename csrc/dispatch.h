// Picks the kernels for this processor.
#pragma once

#include "kernels/table.h"

namespace mlxgpt {

/// The best kernels that were built and that the processor runs, or those that the environment
/// variable MLXGPT_ISA names. Looked up once. Throws std::invalid_argument if that variable names none.
const Kernels& kernels();

}  // namespace mlxgpt
