// All kernels of one instruction set, and their tables.
//
// Included by target_<isa>.cpp behind that file's Vec.
#pragma once

#include "kernels/activation_kernel.h"
#include "kernels/adamw_kernel.h"
#include "kernels/attention_backward.h"
#include "kernels/attention_forward.h"
#include "kernels/cross_entropy_kernel.h"
#include "kernels/elementwise.h"
#include "kernels/few_rows.h"
#include "kernels/layer_norm_kernel.h"
#include "kernels/vector_math.h"

namespace {

const mlxgpt::OpKernels op_kernels = {
    add_bias,      bias_gelu, gelu_backward,      add_columns,
    add,           scale,     layer_norm_forward, layer_norm_backward,
    cross_entropy, squares,   weight_row,         quantized_row,
    quantize,      few_rows,  few_rows_scratch,   adamw,
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
