// Arrays that a launcher reads and writes, and how they are held against float64.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "dtype.h"

namespace check {

using rasa_ext::DType;

// n elements at a chosen distance from 16 bytes. Around them lie guards that must stay as they are;
// under AddressSanitizer nothing does, so that it sees every access beyond.
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
  // Values in (-1, 1) with a few zeros; every draw of a program differs.
  Array& randomize();
  // NaN everywhere, as before something is written.
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

// Fails the program's run, and says what: `name` at element i.
void expect(const std::string& name, const Array& actual,
            const std::function<double(int64_t)>& expected,
            const std::function<double(int64_t)>& allowed);

// Within one cast of `expected`, computed with one rounding in the accumulation dtype.
void expect_rounded(const std::string& name, const Array& actual,
                    const std::function<double(int64_t)>& expected);

// Calls `run` under several schedules, with poisoned outputs, and expects equal bits.
void run_repeatedly(const std::string& name, const std::vector<Array*>& outputs,
                    const std::function<void()>& run);

// What all cases may ask.
bool is_small();  // the short list, for slow instruments
void begin_case(const std::string& name);
[[noreturn]] void fail(const std::string& message);

// Device memory; finish() waits for what was launched.
void* allocate(size_t bytes);
void release(void* memory);
void finish();
void set_schedule(uint64_t seed);

const std::vector<DType>& dtypes();  // float32, bfloat16, float16
std::string name_of(DType dtype);

}  // namespace check
