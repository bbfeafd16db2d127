#include "ops/attention.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"
#include "runtime/scratch.h"

namespace mlxgpt {
namespace {

/// The rows of one head from row `first` on.
StoredRows rows_of(const Tensor4& t, int b, int h, int first = 0) {
    const ptrdiff_t size = t.storage == Storage::kFloat32 ? 4 : 2;
    char* data = static_cast<char*>(t.data);
    if (data != nullptr) data += size * (b * t.batch_stride + h * t.head_stride + first * t.row_stride);
    return {data, t.row_stride, t.storage};
}

AttentionHead head_of(const AttentionCall& call, int index) {
    const int b = index / call.n_head;
    const int h = index % call.n_head;
    const auto rows = [b, h](const Tensor4& t) { return rows_of(t, b, h); };
    AttentionHead head;
    head.q = rows(call.q);
    head.k = rows(call.k);
    head.v = rows(call.v);
    head.out = rows(call.out);
    head.lse = call.lse == nullptr ? nullptr : call.lse + static_cast<ptrdiff_t>(index) * call.T_q;
    head.dout = rows(call.dout);
    head.dq = rows(call.dq);
    head.dk = rows(call.dk);
    head.dv = rows(call.dv);
    head.T_q = call.T_q;
    head.T_k = call.T_k;
    head.D = call.D;
    head.scale = call.scale;
    head.causal = call.causal;
    head.dropout = call.dropout;
    head.seed = call.seed;
    head.batch = static_cast<uint32_t>(b);
    head.head = static_cast<uint32_t>(h);
    return head;
}

// How the heads are divided into tasks. Most heads are one task each, which reads its keys once and needs no
// sums of other tasks. If the number of heads is no multiple of the number of threads, the remaining heads
// would leave threads idle at the end: each of them is split into `parts` tasks. A part takes every parts-th
// block of queries, so that under the causal mask the parts' work differs by at most one block.
struct Plan {
    int n_whole, n_split, parts;

    Plan(int n_heads, int n_blocks, int n_threads) {
        n_split = n_heads % n_threads;
        parts = 1;
        if (n_split > 0)  // the fewest parts with which every thread gets the same number of tasks
            while (n_split * parts % n_threads != 0) ++parts;
        parts = parts < n_blocks ? parts : n_blocks;
        // With many heads a thread, the remaining ones are too little work to be worth adding up sums.
        if (parts == 1 || n_heads >= 16 * n_threads) n_split = 0;
        n_whole = n_heads - n_split;
    }
    int n_tasks() const { return n_whole + n_split * parts; }
    int head(int task) const { return task < n_whole ? task : n_whole + (task - n_whole) / parts; }
    int first(int task) const { return task < n_whole ? 0 : (task - n_whole) % parts; }
    int step(int task) const { return task < n_whole ? 1 : parts; }
};

Plan plan_for(const AttentionCall& call, const Kernels& isa) {
    const int n_blocks = (call.T_q + isa.attention_query_block - 1) / isa.attention_query_block;
    return Plan(call.B * call.n_head, n_blocks, num_threads());
}

}  // namespace

void attention_forward(const AttentionCall& call) {
    const Kernels& isa = kernels();
    const Plan plan = plan_for(call, isa);
    const size_t size = isa.attention_forward_scratch(call.T_k, call.D);
    float* const buffer = scratch(size * num_threads());
    parallel_for(plan.n_tasks(), [&](int task, int worker) {
        isa.attention_forward(head_of(call, plan.head(task)), plan.first(task), plan.step(task),
                              buffer + worker * size);
    });
}

void attention_backward(const AttentionCall& call) {
    const Kernels& isa = kernels();
    const Plan plan = plan_for(call, isa);
    const size_t size = isa.attention_backward_scratch(call.T_k, call.D);
    const size_t sums = isa.attention_kv_sums(call.T_k, call.D);
    // A whole head's sums of dk and dv are the worker's; a part of a head keeps its own until all parts are
    // done.
    float* const buffer = scratch((size + sums) * num_threads() + sums * plan.n_split * plan.parts);
    float* const parts = buffer + (size + sums) * num_threads();
    parallel_for(plan.n_tasks(), [&](int task, int worker) {
        const AttentionHead head = head_of(call, plan.head(task));
        float* own = buffer + worker * (size + sums);
        if (task < plan.n_whole) {
            isa.attention_backward(head, 0, 1, own, own + size);
            isa.attention_write_kv(head, own + size, 1);
        } else {
            isa.attention_backward(head, plan.first(task), plan.step(task), own,
                                   parts + (task - plan.n_whole) * sums);
        }
    });
    parallel_for(plan.n_split, [&](int split, int) {
        isa.attention_write_kv(head_of(call, plan.n_whole + split), parts + split * plan.parts * sums,
                               plan.parts);
    });
}

void attention_cached(const CachedAttention& call) {
    for (int b = 0; b < call.B; ++b)
        if (call.offsets[b] < 0 || call.offsets[b] > call.capacity - call.T)
            throw std::invalid_argument("cached attention: offsets[" + std::to_string(b) + "] is " +
                                        std::to_string(call.offsets[b]) + ", expected 0 to " +
                                        std::to_string(call.capacity - call.T) + ", so that " +
                                        std::to_string(call.T) + " more positions fit");
    const Kernels& isa = kernels();
    // The kernel for a single query packs no keys, but reads them from L2 again for each query. From about as
    // many queries as a panel has lanes, the blocked kernel is faster.
    constexpr int kFewQueries = 16;
    const bool few = call.T <= kFewQueries;
    const size_t size = isa.attention_forward_scratch(1, call.D);
    float* const buffer = scratch(size * num_threads());
    parallel_for(call.B * call.n_head, [&](int task, int worker) {
        const int b = task / call.n_head, h = task % call.n_head, held = call.offsets[b];
        isa.copy_rows(rows_of(call.k, b, h), call.T, call.D, rows_of(call.keys, b, h, held));
        isa.copy_rows(rows_of(call.v, b, h), call.T, call.D, rows_of(call.values, b, h, held));
        for (int i = 0; few && i < call.T; ++i) {
            float lse;
            AttentionHead head;
            head.q = rows_of(call.q, b, h, i);
            head.k = rows_of(call.keys, b, h);
            head.v = rows_of(call.values, b, h);
            head.out = rows_of(call.out, b, h, i);
            head.lse = &lse;
            head.T_q = 1;
            head.T_k = held + i + 1;
            head.D = call.D;
            head.scale = call.scale;
            isa.attention_forward(head, 0, 1, buffer + worker * size);
        }
    });
    if (few) return;
    std::vector<float> lse(static_cast<size_t>(call.n_head) * call.T);
    for (int b = 0; b < call.B; ++b) {
        const auto of_sequence = [b](Tensor4 t) {
            t.data = rows_of(t, b, 0).data;
            return t;
        };
        AttentionCall one;
        one.B = 1;
        one.n_head = call.n_head;
        one.T_q = call.T;
        one.T_k = call.offsets[b] + call.T;
        one.D = call.D;
        one.q = of_sequence(call.q);
        one.k = of_sequence(call.keys);
        one.v = of_sequence(call.values);
        one.out = of_sequence(call.out);
        one.lse = lse.data();
        one.scale = call.scale;
        attention_forward(one);
    }
}

void dropout_mask(const AttentionCall& call, float* mask) {
    const Kernels& isa = kernels();
    parallel_for(call.B * call.n_head, [&](int index, int) {
        isa.dropout_mask(head_of(call, index), mask + static_cast<ptrdiff_t>(index) * call.T_q * call.T_k);
    });
}

}  // namespace mlxgpt
