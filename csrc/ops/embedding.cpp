#include "ops/embedding.h"

#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "runtime/split.h"

namespace mlxgpt {

void embedding_forward(const EmbeddingForward& call) {
    const Kernels& isa = kernels();
    const ptrdiff_t rows = static_cast<ptrdiff_t>(call.B) * call.T;
    parallel_rows(rows, call.C, [&](Range part) {
        for (ptrdiff_t row = part.begin; row < part.begin + part.size; ++row) {
            const ptrdiff_t first = call.offsets == nullptr ? 0 : call.offsets[row / call.T];
            float* out = call.out + row * call.C;
            isa.weight_row(call.tokens.from(call.ids[row]), call.C, out);
            if (call.positions != nullptr)
                isa.add(call.positions + (first + row % call.T) * call.C, call.C, out);
        }
    });
}

void embedding_backward(int B, int T, int C, const int32_t* ids, const float* dout, float* dtokens,
                        float* dpositions) {
    const Kernels& isa = kernels();
    const ptrdiff_t rows = static_cast<ptrdiff_t>(B) * T;
    // A task takes some columns of every row: whatever the ids, no two tasks write the same element, and each
    // sum is taken in order of the rows.
    const int n_parts = n_tasks(static_cast<double>(rows) * C, kElementsPerTask);
    parallel_for(n_parts, [&](int task, int) {
        const Range columns = part_of(C, task, n_parts, 16);
        for (ptrdiff_t row = 0; row < rows; ++row) {
            const float* from = dout + row * C + columns.begin;
            if (dtokens != nullptr)
                isa.add(from, columns.size, dtokens + static_cast<ptrdiff_t>(ids[row]) * C + columns.begin);
            if (dpositions != nullptr) isa.add(from, columns.size, dpositions + row % T * C + columns.begin);
        }
    });
}

}  // namespace mlxgpt
