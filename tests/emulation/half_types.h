// float16 and bfloat16 on a host, only for storage: kernels convert, and compute in float.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulation {

struct float16 {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// `value` without its low `shift` bits, rounded to nearest, ties to even.
inline uint32_t round_off(uint32_t value, int shift) {
  const uint32_t half = uint32_t{1} << (shift - 1), odd = value >> shift & 1;
  return (value + (half - 1) + odd) >> shift;
}

inline float as_float(bfloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline bfloat16 as_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>(round_off(bits, 16))};
}

inline float as_float(float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -tiny : tiny;
  }
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline float16 as_float16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const auto with_sign = [sign](uint32_t rest) {
    return float16{static_cast<uint16_t>(sign | rest)};
  };
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return with_sign(0x7c00);  // 65520 and more
  if (magnitude >= 0x38800000u) return with_sign(round_off(magnitude - (112u << 23), 13));
  if (magnitude < 0x33000000u) return with_sign(0);  // less than half of the smallest number
  const int shift = 126 - static_cast<int>(magnitude >> 23);
  return with_sign(round_off((magnitude & 0x7fffffu) | 0x800000u, shift));
}

}  // namespace emulation
