// Single products go to cublasLt, which can add a bias or another matrix while it writes the
// result. Batches, and products that cublasLt refuses, go to cuBLAS's own functions.
//
// Sums run in float32 (float64 for float64) for all operand types. No product may use partial sums
// in half precision, which torch allows cuBLAS by default.
//
// TF32 follows torch's flag: torch sets it in the math mode of its handle, and this file keeps that
// mode. cuBLAS repeats results bit for bit on one stream with one workspace, and torch assigns both
// to the handle, so torch's determinism flag needs no other path. The workspace belongs to torch,
// so calls can be captured into a graph. Both also hold for cublasLt with the workspace passed to
// it.
#include "blas.h"

#include "blas_lt.h"
#include "blas_types.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// While it lives, forbids partial sums in half precision in the handle's math mode, and TF32 if the
// call does.
class FullPrecisionSums {
 public:
  FullPrecisionSums(cublasHandle_t handle, const GemmCall& call) : handle_(handle) {
    check(cublasGetMathMode(handle, &before_), "cublasGetMathMode", call);
    const int mode = (call.allow_tf32 ? before_ : CUBLAS_DEFAULT_MATH) |
                     CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    check(cublasSetMathMode(handle, static_cast<cublasMath_t>(mode)), "cublasSetMathMode", call);
  }
  ~FullPrecisionSums() { cublasSetMathMode(handle_, before_); }
  FullPrecisionSums(const FullPrecisionSums&) = delete;
  FullPrecisionSums& operator=(const FullPrecisionSums&) = delete;

 private:
  cublasHandle_t handle_;
  cublasMath_t before_ = CUBLAS_DEFAULT_MATH;
};

// Writes to D what the product is added to: C, a bias in each column, or zeros.
void set_result(const Blas& blas, const GemmCall& call) {
  if (call.add && call.in_place()) return;
  Tensor result = tensor_of({call.d, call.out, call.n, call.m, call.ldd, 1}, blas.like);
  if (call.add) {
    void* source = const_cast<void*>(call.c);
    copy(result, tensor_of({source, call.out, call.n, call.m, call.ldc, 1}, blas.like));
  } else {
    fill_zero(result);
  }
}

void gemm_ex(const Blas& blas, const GemmCall& call) {
  const auto handle = static_cast<cublasHandle_t>(blas.handle);
  const FullPrecisionSums scope(handle, call);
  const Scalar alpha(call, call.alpha), beta(call, call.add);
  const cudaDataType_t in = data_type(call.in);
  check(
      cublasGemmEx(handle, operation(call.trans_a), operation(call.trans_b), call.m, call.n, call.k,
                   alpha.get(), call.a, in, call.lda, call.b, in, call.ldb, beta.get(), call.d,
                   data_type(call.out), call.ldd, compute_type(call), CUBLAS_GEMM_DEFAULT),
      "cublasGemmEx", call);
}

}  // namespace

void gemm(const Blas& blas, const GemmCall& call) {
  if (call.empty()) return;
  if (call.k == 0) {
    set_result(blas, call);
  } else if (!gemm_lt(blas, call)) {
    if (call.add) set_result(blas, call);
    gemm_ex(blas, call);
  }
}

void gemm_strided(const Blas& blas, const GemmCall& call) {
  if (call.empty()) return;
  if (call.k == 0) {
    GemmCall one = call;
    for (int i = 0; i < call.batch; ++i) {
      one.d =
          static_cast<char*>(call.d) + i * call.stride_d * static_cast<int64_t>(size_of(call.out));
      one.c = one.d;
      set_result(blas, one);
    }
    return;
  }
  const auto handle = static_cast<cublasHandle_t>(blas.handle);
  const FullPrecisionSums scope(handle, call);
  const Scalar alpha(call, call.alpha), beta(call, call.add);
  const cudaDataType_t in = data_type(call.in);
  check(cublasGemmStridedBatchedEx(handle, operation(call.trans_a), operation(call.trans_b), call.m,
                                   call.n, call.k, alpha.get(), call.a, in, call.lda, call.stride_a,
                                   call.b, in, call.ldb, call.stride_b, beta.get(), call.d,
                                   data_type(call.out), call.ldd, call.stride_d, call.batch,
                                   compute_type(call), CUBLAS_GEMM_DEFAULT),
        "cublasGemmStridedBatchedEx", call);
}

void gemm_pointers(const Blas& blas, const GemmCall& call) {
  if (call.empty()) return;
  const auto handle = static_cast<cublasHandle_t>(blas.handle);
  const FullPrecisionSums scope(handle, call);
  const Scalar alpha(call, call.alpha), beta(call, call.add);
  const cudaDataType_t in = data_type(call.in);
  const auto a = static_cast<const void* const*>(call.a);
  const auto b = static_cast<const void* const*>(call.b);
  const auto d = static_cast<void* const*>(call.d);
  check(cublasGemmBatchedEx(handle, operation(call.trans_a), operation(call.trans_b), call.m,
                            call.n, call.k, alpha.get(), a, in, call.lda, b, in, call.ldb,
                            beta.get(), d, data_type(call.out), call.ldd, call.batch,
                            compute_type(call), CUBLAS_GEMM_DEFAULT),
        "cublasGemmBatchedEx", call);
}

}  // namespace rasa_ext
