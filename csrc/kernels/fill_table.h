// All kernels of one instruction set, and their table.
//
// Included at the end of target_<isa>.cpp, after its Vec.
#pragma once

#include "kernels/activation_table.h"
#include "kernels/adamw_kernel.h"
#include "kernels/addition.h"
#include "kernels/attention_backward.h"
#include "kernels/attention_forward.h"
#include "kernels/cross_entropy_kernel.h"
#include "kernels/dropout_kernel.h"
#include "kernels/few_rows.h"
#include "kernels/layer_norm_kernel.h"
#include "kernels/stored_weights.h"
#include "kernels/table.h"
#include "kernels/tile.h"
#include "kernels/vector_math.h"

namespace {

/// constexpr, so that no instruction of this set runs before the processor is known to have it.
constexpr mlxgpt::Kernels table_of(const char* name) {
    mlxgpt::Kernels table{};
    table.name = name;

    table.attention_query_block = kQueryBlock;
    table.attention_forward_scratch = attention_forward_scratch;
    table.attention_backward_scratch = attention_backward_scratch;
    table.attention_kv_sums = attention_kv_sums;
    table.attention_forward = attention_forward;
    table.attention_backward = attention_backward;
    table.attention_write_kv = attention_write_kv;
    table.dropout_mask = dropout_mask;
    table.copy_rows = copy_rows;

    table.weight_row = weight_row;
    table.quantized_row = quantized_row;
    table.quantize = quantize;
    table.few_rows_scratch = few_rows_scratch;
    table.few_rows = few_rows;
    table.add_bias = add_bias;
    table.add_columns = add_columns;
    table.activations = activations;
    table.n_activations = sizeof activations / sizeof *activations;

    table.layer_norm_forward = layer_norm_forward;
    table.layer_norm_backward = layer_norm_backward;
    table.cross_entropy = cross_entropy;
    table.dropout = dropout;
    table.squares = squares;
    table.adamw = adamw;

    table.add = add;
    table.exp2_nonpositive = map<exp2_nonpositive>;
    table.exp = map<exp>;
    table.log = map<log>;
    table.tanh = map<tanh>;
    table.erf = map<erf>;
    table.fma_burst = fma_burst;
    return table;
}

}  // namespace
