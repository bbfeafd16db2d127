// Tests without Python of the operations that call a BLAS, linear layers and cross entropy: against double
// precision, and from several threads. scripts/check_targets.sh builds and runs it, after test_kernels.cpp.
#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "ops/activation.h"
#include "ops/cross_entropy.h"
#include "ops/linear.h"
#include "runtime/dispatch.h"
#include "tests/testing.h"

using namespace mlxgpt;

namespace {

std::mt19937 generator(0);

/// A matrix of random numbers with gaps between its rows, which nobody may write to.
struct Matrix {
    static constexpr float kBetween = 1e30F;
    int rows, columns, stride;
    std::vector<float> memory;

    Matrix(int rows_, int columns_, int gap = 3)
        : rows(rows_), columns(columns_), stride(columns_ + gap), memory(rows * stride, kBetween) {
        std::normal_distribution<float> normal;
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < columns; ++j) memory[i * stride + j] = normal(generator);
    }
    double operator()(int i, int j) const { return memory[i * stride + j]; }
    Rows view() { return {memory.data(), stride}; }
};

Weights weights_of(const Matrix& a) {
    Weights weights;
    weights.data = a.memory.data();
    weights.stride = a.stride;
    return weights;
}

/// Compares a matrix with exact(i, j), up to the rounding errors of a sum of `terms` in float.
template <class Exact>
void compare(const char* what, const Matrix& found, int terms, Exact exact) {
    double worst = 0;
    bool between = true;
    for (int i = 0; i < found.rows; ++i) {
        for (int j = 0; j < found.columns; ++j) {
            const double off = std::fabs(found(i, j) - exact(i, j));
            worst = off <= worst ? worst : off;  // NaN becomes the worst, and stays
        }
        for (int j = found.columns; j < found.stride; ++j) between &= found(i, j) == Matrix::kBetween;
    }
    expect(worst <= 1e-5 * std::sqrt(terms), "%s (%d x %d, sums of %d) is off by %g", what, found.rows,
           found.columns, terms, worst);
    expect(between, "%s (%d x %d): wrote between rows", what, found.rows, found.columns);
}

// The definitions of the activation functions.
double gelu_new(double x) {
    return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}
double gelu(double x) { return 0.5 * x * std::erfc(-x * std::sqrt(0.5)); }

void check_linear(int rows, int n_in, int n_out, const char* activation, double (*f)(double)) {
    Matrix x(rows, n_in), weight(n_out, n_in), bias(1, n_out), residual(rows, n_out), out(rows, n_out),
        activated(rows, n_out);
    const auto product = [&](int i, int j) {
        double sum = bias(0, j);
        for (int k = 0; k < n_in; ++k) sum += x(i, k) * weight(j, k);
        return sum;
    };
    LinearForward forward;
    forward.rows = rows;
    forward.n_in = n_in;
    forward.n_out = n_out;
    forward.x = x.view();
    forward.weight = weights_of(weight);
    forward.bias = bias.memory.data();
    forward.out = out.view();
    forward.activation = &activation_named(activation);
    forward.residual = residual.view();
    linear_forward(forward);
    compare("x W^T + b + residual", out, n_in, [&](int i, int j) { return product(i, j) + residual(i, j); });
    forward.residual = {};
    forward.activated = activated.view();
    linear_forward(forward);
    compare("x W^T + b", out, n_in, product);
    compare(activation, activated, n_in, [&](int i, int j) { return f(product(i, j)); });

    Matrix dout(rows, n_out), dx(rows, n_in), dweight(n_out, n_in), dbias(1, n_out), recomputed(rows, n_in);
    const Matrix dweight_before = dweight, dbias_before = dbias;
    LinearBackward backward;
    backward.rows = rows;
    backward.n_in = n_in;
    backward.n_out = n_out;
    backward.dout = dout.view();
    backward.x = x.view();
    backward.weight = weight.view();
    backward.dx = dx.view();
    backward.dweight = dweight.view();
    backward.dbias = dbias.memory.data();
    backward.accumulate = true;
    backward.activation = &activation_named(activation);
    const auto exact_dx = [&](int i, int k) {
        double sum = 0;
        for (int j = 0; j < n_out; ++j) sum += dout(i, j) * weight(j, k);
        return sum;
    };
    linear_backward(backward);
    compare("dx", dx, n_out, exact_dx);
    compare("dweight", dweight, rows, [&](int j, int k) {
        double sum = dweight_before(j, k);
        for (int i = 0; i < rows; ++i) sum += dout(i, j) * x(i, k);
        return sum;
    });
    compare("dbias", dbias, rows, [&](int, int j) {
        double sum = dbias_before(0, j);
        for (int i = 0; i < rows; ++i) sum += dout(i, j);
        return sum;
    });
    backward.dweight = {};
    backward.dbias = nullptr;
    backward.pre = x.view();
    backward.activated = recomputed.view();
    linear_backward(backward);
    const auto slope = [f](double at) { return (f(at + 1e-5) - f(at - 1e-5)) / 2e-5; };
    compare("dx through the activation", dx, n_out,
            [&](int i, int k) { return exact_dx(i, k) * slope(x(i, k)); });
    compare("recomputed activation", recomputed, 1, [&](int i, int k) { return f(x(i, k)); });
}

// The forward pass, for few and for many rows, and the loss, with weights in any storage.
void check_storage(int rows, int n_in, int n_out, Storage storage, int bits, int group) {
    const StoredWeights weights(n_out, n_in, storage, bits, group);
    Matrix x(rows, n_in), bias(1, n_out), out(rows, n_out), activated(rows, n_out);
    std::vector<double> exact(static_cast<size_t>(rows) * n_out);
    double loss = 0;
    const std::vector<int32_t> targets(rows, n_out / 2);
    for (int i = 0; i < rows; ++i) {
        double sum = 0;
        for (int j = 0; j < n_out; ++j) {
            double& product = exact[static_cast<size_t>(i) * n_out + j];
            for (int k = 0; k < n_in; ++k)
                product += x(i, k) * weights.exact[static_cast<size_t>(j) * n_in + k];
            sum += std::exp(product);
        }
        loss += (std::log(sum) - exact[static_cast<size_t>(i) * n_out + n_out / 2]) / rows;
    }
    const auto with_bias = [&](int i, int j) {
        return exact[static_cast<size_t>(i) * n_out + j] + bias(0, j);
    };
    LinearForward call;
    call.rows = rows;
    call.n_in = n_in;
    call.n_out = n_out;
    call.x = x.view();
    call.weight = weights.view;
    call.bias = bias.memory.data();
    call.out = out.view();
    call.activated = activated.view();
    call.activation = &activation_named("gelu_new");
    linear_forward(call);
    // If x is quantized, each term's error is a fraction of x's largest element.
    const int terms = bits == 0 ? n_in : 400 * n_in;
    compare("x W^T of stored weights", out, terms, with_bias);
    compare("gelu_new of stored weights", activated, terms,
            [&](int i, int j) { return gelu_new(with_bias(i, j)); });
    LinearCrossEntropy entropy;
    entropy.N = rows;
    entropy.C = n_in;
    entropy.V = n_out;
    entropy.x = x.view();
    entropy.weight = weights.view;
    entropy.targets = targets.data();
    const double found = linear_cross_entropy(entropy);
    expect(std::fabs(found - loss) < 1e-5 * (1 + loss), "cross entropy with %d bits is %g, expected %g", bits,
           found, loss);
}

void check_cross_entropy(int N, int C, int V) {
    Matrix x(N, C), weight(V, C), dx(N, C), dweight(V, C);
    std::vector<int32_t> targets(N);
    for (int i = 0; i < N; ++i) targets[i] = i % 5 == 3 ? -1 : static_cast<int32_t>(generator() % V);
    const int counted = static_cast<int>(N - std::count(targets.begin(), targets.end(), -1));
    const Matrix before = dweight;
    std::vector<double> exact_dx(N * C), exact_dweight(V * C), p(V);
    double exact = 0;
    for (int i = 0; i < N; ++i) {
        if (targets[i] < 0) continue;
        double sum = 0;
        for (int j = 0; j < V; ++j) {
            p[j] = 0;
            for (int k = 0; k < C; ++k) p[j] += x(i, k) * weight(j, k);
            if (j == targets[i]) exact -= p[j] / counted;
            sum += p[j] = std::exp(p[j]);
        }
        exact += std::log(sum) / counted;
        for (int j = 0; j < V; ++j) {
            const double slope = 0.5 * (p[j] / sum - (j == targets[i] ? 1 : 0)) / counted;
            for (int k = 0; k < C; ++k) {
                exact_dx[i * C + k] += slope * weight(j, k);
                exact_dweight[j * C + k] += slope * x(i, k);
            }
        }
    }
    LinearCrossEntropy call;
    call.N = N;
    call.C = C;
    call.V = V;
    call.x = x.view();
    call.weight = weights_of(weight);
    call.targets = targets.data();
    call.dx = dx.view();
    call.dweight = dweight.view();
    call.accumulate = true;
    call.scale = 0.5F;
    const double found = linear_cross_entropy(call);
    expect(std::fabs(found - exact) < 1e-5 * (1 + exact), "cross entropy (%d x %d x %d) is %g, expected %g",
           N, C, V, found, exact);
    compare("cross entropy's dx", dx, C, [&](int i, int k) { return exact_dx[i * C + k]; });
    compare("cross entropy's dweight", dweight, C,
            [&](int j, int k) { return before(j, k) + exact_dweight[j * C + k]; });
}

void check_threads() {
    static constexpr int kRows = 150, kIn = 70, kOut = 200;
    Matrix x(kRows, kIn), weight(kOut, kIn);
    const std::vector<int32_t> targets(kRows, 7);
    const auto compute = [&] {
        std::vector<float> results(kRows * kOut + kRows * kIn + kOut * kIn);
        float *out = results.data(), *dx = out + kRows * kOut, *dweight = dx + kRows * kIn;
        LinearForward forward;
        forward.rows = kRows;
        forward.n_in = kIn;
        forward.n_out = kOut;
        forward.x = x.view();
        forward.weight = weights_of(weight);
        forward.out = {out, kOut};
        linear_forward(forward);
        LinearCrossEntropy loss;
        loss.N = kRows;
        loss.C = kIn;
        loss.V = kOut;
        loss.x = x.view();
        loss.weight = weights_of(weight);
        loss.targets = targets.data();
        loss.dx = {dx, kIn};
        loss.dweight = {dweight, kIn};
        linear_cross_entropy(loss);
        return results;
    };
    const std::vector<float> expected = compute();
    std::vector<std::thread> threads;
    std::vector<int> same(4);
    for (int n = 0; n < 4; ++n)
        threads.emplace_back([&, n] {
            for (int run = 0; run < 5; ++run) same[n] += compute() == expected;
        });
    for (std::thread& thread : threads) thread.join();
    for (const int n : same) expect(n == 5, "products: %d of 5 runs of a thread gave other bits", 5 - n);
}

}  // namespace

int main() {
    std::printf("%s\n", kernels().name);
    for (const auto& [rows, n_in, n_out] : {std::array{1, 1, 1}, {7, 33, 5}, {150, 70, 200}}) {
        check_linear(rows, n_in, n_out, "gelu_new", gelu_new);  // the last shape has more than one task
        check_linear(rows, n_in, n_out, "gelu", gelu);
    }
    check_cross_entropy(1, 1, 1);
    check_cross_entropy(70, 33, 50);
    check_cross_entropy(66, 2, 230'000);  // more than one chunk
    for (const int rows : {1, kFewRows, kFewRows + 1, 70})
        for_storages(128, [&](Storage storage, int bits, int group) {
            check_storage(rows, 128, 300, storage, bits, group);
        });
    check_storage(40, 20'000, 40, Storage::kFloat16, 0, 0);  // in more than one panel
    check_threads();
    return verdict();
}
