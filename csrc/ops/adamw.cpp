#include "ops/adamw.h"

#include <algorithm>
#include <cmath>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace mlxgpt {
namespace {

// Tensors are cut into pieces of at most this many elements, and a task takes pieces until it has as many:
// the many small tensors of a small model make few tasks, a large matrix makes many. 64 K elements of four
// arrays are 1 MB, enough that waking a thread pays.
constexpr ptrdiff_t kPiece = 65536;

struct Piece {
    const AdamWTensor* tensor;
    ptrdiff_t first, n;
};

// The sum of squares in double, which is finite if every x is.
double squares_in_double(const float* x, ptrdiff_t n) {
    double sum = 0;
    for (ptrdiff_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
    return sum;
}

}  // namespace

double adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options) {
    const Kernels& isa = kernels();
    std::vector<Piece> pieces;
    std::vector<int> tasks{0};  // task i takes the pieces from tasks[i] up to tasks[i + 1]
    ptrdiff_t elements = 0;
    for (const AdamWTensor& tensor : tensors)
        for (ptrdiff_t first = 0; first < tensor.n; first += kPiece) {
            pieces.push_back({&tensor, first, std::min(kPiece, tensor.n - first)});
            elements += pieces.back().n;
            if (elements < kPiece) continue;
            tasks.push_back(static_cast<int>(pieces.size()));
            elements = 0;
        }
    if (elements > 0) tasks.push_back(static_cast<int>(pieces.size()));
    const int n_tasks = static_cast<int>(tasks.size()) - 1;

    std::vector<double> sums(pieces.size());
    parallel_for(n_tasks, [&](int task, int) {
        for (int i = tasks[task]; i < tasks[task + 1]; ++i) {
            const float* gradient = pieces[i].tensor->gradient + pieces[i].first;
            sums[i] = isa.squares(gradient, pieces[i].n);
            // The kernel sums in float, and the square of 1.8e19 overflows there.
            if (!std::isfinite(sums[i])) sums[i] = squares_in_double(gradient, pieces[i].n);
        }
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    const double norm = std::sqrt(total);
    if (!std::isfinite(norm)) return norm;

    AdamWStep step;
    double clip = 1.0;
    if (options.max_norm > 0)  // PyTorch and MLX add the same 1e-6
        clip = std::min(1.0, options.max_norm / (norm + 1e-6));
    step.clip = static_cast<float>(clip);
    step.learning_rate = static_cast<float>(options.learning_rate);
    step.beta1 = static_cast<float>(options.beta1);
    step.beta2 = static_cast<float>(options.beta2);
    step.eps = static_cast<float>(options.eps);
    step.correction1 = static_cast<float>(1.0 / (1.0 - std::pow(options.beta1, options.step)));
    step.correction2 = static_cast<float>(1.0 / (1.0 - std::pow(options.beta2, options.step)));
    const float decay = static_cast<float>(1.0 - options.learning_rate * options.weight_decay);
    parallel_for(n_tasks, [&](int task, int) {
        for (int i = tasks[task]; i < tasks[task + 1]; ++i) {
            const Piece& piece = pieces[i];
            const AdamWTensor& t = *piece.tensor;
            isa.adamw(t.parameter + piece.first, t.gradient + piece.first, t.m + piece.first,
                      t.v + piece.first, piece.n, t.decayed ? decay : 1.0F, step);
        }
    });
    return norm;
}

}  // namespace mlxgpt
