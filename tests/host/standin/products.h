// Products on the CPU, and a record of them, for the stand-ins of cuBLAS and cublasLt.
#pragma once

#include <cstdint>
#include <string>

#include "cublas_v2.h"

namespace standin {

// D = alpha op(A) op(B) + beta C, column-major. If C is not read, beta and ldc have no meaning.
struct Product {
  cublasOperation_t transa, transb;
  int64_t m, n, k;
  double alpha, beta;
  cudaDataType in, in_b, out;
  int64_t lda, ldb, ldc, ldd;
  cublasComputeType_t compute;
  const void* bias = nullptr;  // added to every column
};

// Reads alpha or beta in the type that cuBLAS expects for `compute`.
double scalar(cublasComputeType_t compute, const void* value);

// Checks the documented limits of leading dimensions and the documented combinations of types.
cublasStatus_t judge(const Product& product);

void multiply(const Product& product, const void* a, const void* b, const void* c, void* d);

// Records "name m=... n=... k=... batch=... beta=... out=<bytes of an element>" and then `more`.
void record(const char* name, const Product& product, int batch, const std::string& more);

int size_of(cudaDataType type);

}  // namespace standin
