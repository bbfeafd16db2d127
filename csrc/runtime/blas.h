// The matrix product of the BLAS that this was built with. The only file that knows which BLAS that is.
#pragma once

#if defined(MLXGPT_BLAS_ACCELERATE)
#include <Accelerate/Accelerate.h>
#define MLXGPT_BLAS(name) cblas_##name
#elif defined(MLXGPT_BLAS_SCIPY_OPENBLAS)
#include <cblas.h>  // scipy-openblas32 prefixes its symbols
#define MLXGPT_BLAS(name) scipy_cblas_##name
#define MLXGPT_BLAS_SET_THREADS scipy_openblas_set_num_threads
#else
#include <cblas.h>
#define MLXGPT_BLAS(name) cblas_##name
#if defined(OPENBLAS_VERSION)
#define MLXGPT_BLAS_SET_THREADS openblas_set_num_threads
#endif
#endif

namespace mlxgpt {

/// A matrix stored as rows: row i begins at data + i * stride. If transposed, the matrix is the transpose of
/// what is stored.
struct Operand {
    const float* data;
    int stride;
    bool transposed = false;
};

/// C = A B + beta C for C (m, n) and inner length k, on the calling thread alone.
inline void gemm(int m, int n, int k, Operand a, Operand b, float beta, float* c, int stride) {
#if defined(MLXGPT_BLAS_SET_THREADS)
    [[maybe_unused]] static const bool once = (MLXGPT_BLAS_SET_THREADS(1), true);
#endif
    MLXGPT_BLAS(sgemm)
    (CblasRowMajor, a.transposed ? CblasTrans : CblasNoTrans, b.transposed ? CblasTrans : CblasNoTrans, m, n,
     k, 1.0F, a.data, a.stride, b.data, b.stride, beta, c, stride);
}

}  // namespace mlxgpt
