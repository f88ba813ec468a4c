// What the stand-ins for cuBLAS and cublasLt share: products on the CPU, and a record of them.
#pragma once

#include <cstdint>
#include <string>

#include "cublas_v2.h"

namespace standin {

// D = alpha op(A) op(B) + beta C, column-major. beta and ldc say nothing where C is not read.
struct Product {
  cublasOperation_t transa, transb;
  int64_t m, n, k;
  double alpha, beta;
  cudaDataType in, in_b, out;
  int64_t lda, ldb, ldc, ldd;
  cublasComputeType_t compute;
  const void* bias = nullptr;  // added to every column
};

// alpha or beta, in the type that cuBLAS reads it in.
double scalar(cublasComputeType_t compute, const void* value);

// The documented limits of the leading dimensions, and the documented combinations of types.
cublasStatus_t judge(const Product& product);

void multiply(const Product& product, const void* a, const void* b, const void* c, void* d);

// "name m=... n=... k=... batch=... beta=... out=..., bytes of an element"; and what is appended.
void record(const char* name, const Product& product, int batch, const std::string& more);

int size_of(cudaDataType type);

}  // namespace standin
