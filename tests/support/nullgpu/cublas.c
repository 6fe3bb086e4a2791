// cuBLAS: the products of matrices that torch asks for, by their shapes.
#include "nullgpu.h"
#define __CUDA_FP16_H__ // their header needs one that no package of torch's has
#define __CUDA_BF16_H__
#include <cublasLt.h>
#include <cublas_v2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static __thread Stream *stream;
static __thread cublasMath_t math;

static cublasStatus_t product(const char *kind, int m, int n, int k, int batch) {
    char name[120];
    snprintf(name, sizeof name, "GEMM %s m=%d n=%d k=%d batch=%d math=%d", kind, m, n, k, batch, math);
    launched(name, 0, 0, 0, 0, stream ? stream : stream_of(NULL));
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    static int only;
    *handle = (cublasHandle_t)&only;
    return 0;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t h) { return 0; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) {
    stream = stream_of(s);
    return 0;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void *workspace, size_t size) { return 0; }
cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t mode) {
    math = mode;
    return 0;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t *mode) {
    *mode = math;
    return 0;
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t mode) { return 0; }
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t *mode) { return *mode = 0; }
const char *cublasGetStatusString(cublasStatus_t status) { return "an error of a GPU that computes nothing"; }

cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType at, int lda, const void *b, cudaDataType bt,
                            int ldb, const void *beta, void *c, cudaDataType ct, int ldc, cublasComputeType_t compute,
                            cublasGemmAlgo_t algorithm) {
    return product("half", m, n, k, 1);
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                              const float *alpha, const float *a, int lda, const float *b, int ldb, const float *beta,
                              float *c, int ldc) {
    return product("float", m, n, k, 1);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                         int k, const float *alpha, const float *a, int lda, long long sa,
                                         const float *b, int ldb, long long sb, const float *beta, float *c, int ldc,
                                         long long sc, int batch) {
    return product("float", m, n, k, batch);
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                          int k, const void *alpha, const void *a, cudaDataType at, int lda,
                                          long long sa, const void *b, cudaDataType bt, int ldb, long long sb,
                                          const void *beta, void *c, cudaDataType ct, int ldc, long long sc, int batch,
                                          cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return product("half", m, n, k, batch);
}

typedef struct {
    uint64_t rows, columns;
} Layout;
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t ld) {
    Layout *layout = malloc(sizeof *layout);
    *layout = (Layout){rows, columns};
    *made = (cublasLtMatrixLayout_t)layout;
    return 0;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    free((void *)layout);
    return 0;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t a,
                                                const void *value, size_t size) {
    return 0;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t compute, cudaDataType_t type) {
    *made = calloc(1, 64);
    return 0;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    free(description);
    return 0;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a,
                                              const void *value, size_t size) {
    return 0;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
    *made = calloc(1, 64);
    return 0;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    free(preference);
    return 0;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                    cublasLtMatmulPreferenceAttributes_t a, const void *value,
                                                    size_t size) {
    return 0;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t o, cublasLtMatmulPreference_t p, int most,
                                              cublasLtMatmulHeuristicResult_t *results, int *found) {
    memset(results, 0, sizeof *results);
    *found = 1;
    return 0;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t la, const void *b, cublasLtMatrixLayout_t lb, const void *beta,
                              const void *c, cublasLtMatrixLayout_t lc, void *o, cublasLtMatrixLayout_t lo,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t size, cudaStream_t s) {
    stream = stream_of(s);
    return product("lt", ((Layout *)lo)->rows, ((Layout *)lo)->columns, ((Layout *)la)->rows, 1);
}
unsigned long cublasLtGetVersion(void) { return 130100; }
