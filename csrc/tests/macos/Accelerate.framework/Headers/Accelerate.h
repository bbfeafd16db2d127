// Stands in for Apple's header where scripts/check_targets.sh compiles for macOS without Apple's SDK: what
// runtime/blas.h uses, declared as <vecLib/cblas_new.h> declares it from the SDK of macOS 13.3 on.
// Accelerate.tbd beside it stands in for the library.
#pragma once

#if !defined(ACCELERATE_NEW_LAPACK)
#error \
    "ACCELERATE_NEW_LAPACK is not defined: Apple's header then declares the old interface, which is deprecated"
#endif

extern "C" {

enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor = 102 };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112, CblasConjTrans = 113, AtlasConj = 114 };

void cblas_sgemm(const enum CBLAS_ORDER order, const enum CBLAS_TRANSPOSE trans_a,
                 const enum CBLAS_TRANSPOSE trans_b, const int m, const int n, const int k, const float alpha,
                 const float* a, const int lda, const float* b, const int ldb, const float beta, float* c,
                 const int ldc) __asm("_cblas_sgemm$NEWLAPACK")
    __attribute__((availability(macos, introduced = 13.3)));
}
