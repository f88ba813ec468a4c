// Arrays that a launcher reads and writes, and comparisons of them with float64.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "dtype.h"

namespace check {

using rasa_ext::DType;

// n elements at a chosen offset from a 16-byte boundary. Guard bytes around them must not change.
// Under AddressSanitizer there are no guards, so that it detects every access out of bounds.
class Array {
 public:
  Array(DType dtype, int64_t n, int offset = 0);  // offset in elements
  ~Array();
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  int64_t size() const { return n_; }
  DType dtype() const { return dtype_; }
  void* data() const { return n_ > 0 ? data_ : nullptr; }
  double operator[](int64_t i) const;
  void set(int64_t i, double value);
  // Draws values in (-1, 1), a few of them zero. No two draws in a program are equal.
  Array& randomize();
  // Fills the array with NaN, to show elements that are not written.
  Array& poison();
  std::vector<uint8_t> bytes() const;
  void check_guards(const std::string& name) const;

 private:
  DType dtype_;
  int64_t n_;
  unsigned char* whole_;
  unsigned char* data_;
};

// The relative rounding error of one cast.
double rounding(DType dtype);

// Fails with `name` and the index if an element differs from `expected` by more than `allowed`.
void expect(const std::string& name, const Array& actual,
            const std::function<double(int64_t)>& expected,
            const std::function<double(int64_t)>& allowed);

// Fails unless each element is `expected`, rounded once in the accumulation dtype and once by the
// cast.
void expect_rounded(const std::string& name, const Array& actual,
                    const std::function<double(int64_t)>& expected);

// Calls `run` under several schedules, with poisoned outputs. Fails unless results are
// bit-identical.
void run_repeatedly(const std::string& name, const std::vector<Array*>& outputs,
                    const std::function<void()>& run);

// For all cases.
bool is_small();  // whether to run only the short list, for slow runs
void begin_case(const std::string& name);
[[noreturn]] void fail(const std::string& message);

// Device memory; finish() waits for all launched work.
void* allocate(size_t bytes);
void release(void* memory);
void finish();
void set_schedule(uint64_t seed);

const std::vector<DType>& dtypes();  // float32, bfloat16, float16
std::string name_of(DType dtype);

}  // namespace check
