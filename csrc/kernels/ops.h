// All kernels of one instruction set, and their tables.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

#include "adamw.h"
#include "attention_backward.h"
#include "attention_forward.h"
#include "cross_entropy.h"
#include "elementwise.h"
#include "gelu.h"
#include "layer_norm.h"
#include "math.h"

namespace {

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
};

}  // namespace

/// For the end of target_<isa>.cpp.
#define MLXGPT_KERNEL_TABLE(name) \
    {name,                        \
     kQueryBlock,                 \
     forward_scratch,             \
     backward_scratch,            \
     kv_sums,                     \
     attention_forward,           \
     copy_rows,                   \
     attention_backward,          \
     attention_write_kv,          \
     dropout_mask,                \
     map<exp2_nonpositive>,       \
     map<exp>,                    \
     map<log>,                    \
     map<tanh>,                   \
     map<erf>,                    \
     fma_burst,                   \
     &op_kernels}
