#include "products.h"

#include <mutex>
#include <vector>

#include "numbers.h"

namespace standin {
namespace {

std::vector<std::string> calls;
std::mutex calls_mutex;

rasa_ext::DType dtype_of(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F:
      return rasa_ext::DType::kFloat64;
    case CUDA_R_32F:
      return rasa_ext::DType::kFloat32;
    case CUDA_R_16BF:
      return rasa_ext::DType::kBFloat16;
    default:
      return rasa_ext::DType::kFloat16;
  }
}

}  // namespace

int size_of(cudaDataType type) { return static_cast<int>(rasa_ext::size_of(dtype_of(type))); }

double scalar(cublasComputeType_t compute, const void* value) {
  return compute == CUBLAS_COMPUTE_64F ? *static_cast<const double*>(value)
                                       : *static_cast<const float*>(value);
}

cublasStatus_t judge(const Product& p) {
  // cuBLAS does not document empty sums.
  if (p.m <= 0 || p.n <= 0 || p.k <= 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.lda < (p.transa == CUBLAS_OP_N ? p.m : p.k)) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.ldb < (p.transb == CUBLAS_OP_N ? p.k : p.n)) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.beta != 0 && p.ldc < p.m) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.ldd < p.m) return CUBLAS_STATUS_INVALID_VALUE;
  const bool wide = p.in == CUDA_R_64F;
  const bool fits = p.in == p.in_b && (p.out == p.in || (!wide && p.out == CUDA_R_32F)) &&
                    (p.compute == CUBLAS_COMPUTE_64F) == wide &&
                    (p.compute != CUBLAS_COMPUTE_32F_FAST_TF32 || p.in == CUDA_R_32F);
  return fits ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

void multiply(const Product& p, const void* a, const void* b, const void* c, void* d) {
  const rasa_ext::DType in = dtype_of(p.in), out = dtype_of(p.out);
  // Convert each number once, with the summed dimension contiguous.
  std::vector<double> rows(p.m * p.k), columns(p.k * p.n);
  for (int64_t l = 0; l < p.k; ++l) {
    for (int64_t i = 0; i < p.m; ++i) {
      rows[i * p.k + l] =
          rasa_ext::load(a, in, p.transa == CUBLAS_OP_N ? i + l * p.lda : l + i * p.lda);
    }
    for (int64_t j = 0; j < p.n; ++j) {
      columns[j * p.k + l] =
          rasa_ext::load(b, in, p.transb == CUBLAS_OP_N ? l + j * p.ldb : j + l * p.ldb);
    }
  }
  for (int64_t j = 0; j < p.n; ++j) {
    for (int64_t i = 0; i < p.m; ++i) {
      double sum = 0;
      for (int64_t l = 0; l < p.k; ++l) sum += rows[i * p.k + l] * columns[j * p.k + l];
      sum *= p.alpha;
      // If beta is 0, C may contain anything, even NaN.
      if (p.beta != 0) sum += p.beta * rasa_ext::load(c, out, i + j * p.ldc);
      if (p.bias != nullptr) sum += rasa_ext::load(p.bias, out, i);
      rasa_ext::store(d, out, i + j * p.ldd, sum);
    }
  }
}

void record(const char* name, const Product& p, int batch, const std::string& more) {
  const std::lock_guard<std::mutex> lock(calls_mutex);
  calls.push_back(std::string(name) + " m=" + std::to_string(p.m) + " n=" + std::to_string(p.n) +
                  " k=" + std::to_string(p.k) + " batch=" + std::to_string(batch) +
                  " beta=" + std::to_string(static_cast<int>(p.beta)) +
                  " out=" + std::to_string(size_of(p.out)) + more);
}

}  // namespace standin

// For the tests: the calls since the last reset, one on each line.
extern "C" const char* recorded_calls() {
  static std::string text;
  text.clear();
  for (const std::string& call : standin::calls) text += call + "\n";
  return text.c_str();
}

extern "C" void reset_calls() { standin::calls.clear(); }
