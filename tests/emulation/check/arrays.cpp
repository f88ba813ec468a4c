#include "arrays.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>

#include "half_types.h"

namespace check {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 64;
#endif
constexpr int kGuardByte = 0xa5;

std::mt19937_64& values() {
  static std::mt19937_64 source(20240229);
  return source;
}

}  // namespace

Array::Array(DType dtype, int64_t n, int offset) : dtype_(dtype), n_(n) {
  const size_t before = kGuard + offset * size_of(dtype), size = n * size_of(dtype);
  whole_ = static_cast<unsigned char*>(allocate(before + size + kGuard));
  std::memset(whole_, kGuardByte, before + size + kGuard);
  data_ = whole_ + before;
}

Array::~Array() { release(whole_); }

double Array::operator[](int64_t i) const {
  const unsigned char* at = data_ + i * size_of(dtype_);
  switch (dtype_) {
    case DType::kFloat64: {
      double value;
      std::memcpy(&value, at, sizeof value);
      return value;
    }
    case DType::kFloat32: {
      float value;
      std::memcpy(&value, at, sizeof value);
      return value;
    }
    case DType::kFloat16: {
      emulation::float16 value;
      std::memcpy(&value, at, sizeof value);
      return emulation::as_float(value);
    }
    default: {
      emulation::bfloat16 value;
      std::memcpy(&value, at, sizeof value);
      return emulation::as_float(value);
    }
  }
}

void Array::set(int64_t i, double value) {
  unsigned char* at = data_ + i * size_of(dtype_);
  const float single = static_cast<float>(value);
  const auto half = emulation::as_float16(single);
  const auto brain = emulation::as_bfloat16(single);
  switch (dtype_) {
    case DType::kFloat64:
      std::memcpy(at, &value, 8);
      break;
    case DType::kFloat32:
      std::memcpy(at, &single, 4);
      break;
    case DType::kFloat16:
      std::memcpy(at, &half, 2);
      break;
    default:
      std::memcpy(at, &brain, 2);
  }
}

Array& Array::randomize() {
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (int64_t i = 0; i < n_; ++i) {
    const double value = uniform(values());
    set(i, std::abs(value) < 0.02 ? 0.0 : value);
  }
  return *this;
}

Array& Array::poison() {
  std::memset(data_, 0xff, n_ * size_of(dtype_));
  return *this;
}

std::vector<uint8_t> Array::bytes() const { return {data_, data_ + n_ * size_of(dtype_)}; }

void Array::check_guards(const std::string& name) const {
  const unsigned char* end = data_ + n_ * size_of(dtype_);
  bool whole = true;
  for (const unsigned char* at = whole_; at < data_; ++at) whole = whole && *at == kGuardByte;
  for (size_t i = 0; i < kGuard; ++i) whole = whole && end[i] == kGuardByte;
  if (!whole) fail(name + ": something wrote beside it");
}

double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kFloat16:
      return 0x1p-11;
    default:
      return 0x1p-8;
  }
}

void expect(const std::string& name, const Array& actual,
            const std::function<double(int64_t)>& expected,
            const std::function<double(int64_t)>& allowed) {
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double want = expected(i), got = actual[i];
    if (!(std::abs(got - want) <= allowed(i))) {
      fail(name + "[" + std::to_string(i) + "]: expected " + std::to_string(want) + ", got " +
           std::to_string(got));
    }
  }
  actual.check_guards(name);
}

void expect_rounded(const std::string& name, const Array& actual,
                    const std::function<double(int64_t)>& expected) {
  const double once = rounding(actual.dtype()) + rounding(accumulation(actual.dtype()));
  // The smallest float16 is 2^-24.
  const double least = actual.dtype() == DType::kFloat16 ? 0x1p-24 : 0x1p-126;
  expect(name, actual, expected,
         [&](int64_t i) { return once * std::abs(expected(i)) * (1 + 1e-6) + least; });
}

void run_repeatedly(const std::string& name, const std::vector<Array*>& outputs,
                    const std::function<void()>& run) {
  std::vector<std::vector<uint8_t>> first;
#if defined(__SANITIZE_ADDRESS__) && !defined(RASA_FEW_TYPES)
  const int schedules = 1;  // addresses do not depend on the schedule
#else
  const int schedules = is_small() ? 1 : 2;  // enough for every mutant of a barrier to fail
#endif
  for (int schedule = 0; schedule < schedules; ++schedule) {
    for (Array* output : outputs) output->poison();
    set_schedule(static_cast<uint64_t>(schedule) * 7919 + 1);
    run();
    finish();
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (schedule == 0) {
        first.push_back(outputs[i]->bytes());
      } else if (first[i] != outputs[i]->bytes()) {
        fail(name + ": output " + std::to_string(i) + " depends on the order of execution");
      }
    }
  }
}

const std::vector<DType>& dtypes() {
#if defined(RASA_FEW_TYPES) || defined(__SANITIZE_ADDRESS__)
  static const std::vector<DType> all{DType::kFloat32, DType::kBFloat16};
#else
  static const std::vector<DType> all{DType::kFloat32, DType::kBFloat16, DType::kFloat16};
#endif
  return all;
}

std::string name_of(DType dtype) {
  static const char* const names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[static_cast<int>(dtype)];
}

}  // namespace check
