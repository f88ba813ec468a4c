// Turns run-time values into template arguments.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "dtype.h"
#include "platform.cuh"

namespace rasa_ext {

template <typename T>
struct Type {
  using type = T;
};
template <typename Tag>
using TypeOf = typename Tag::type;

// Calls body(Type<T>{}) with the type of a dtype.
template <typename Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat64:
      return body(Type<double>{});
    case DType::kFloat16:
      return body(Type<float16>{});
    case DType::kBFloat16:
      return body(Type<bfloat16>{});
  }
}

// Like with_type, without float64.
template <typename Body>
void with_single_or_half(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat16:
      return body(Type<float16>{});
    case DType::kBFloat16:
      return body(Type<bfloat16>{});
    default:
      throw std::invalid_argument("dtype: expected float32, float16 or bfloat16, got float64");
  }
}

// Like with_type, with only the half types.
template <typename Body>
void with_half(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(Type<float16>{});
    case DType::kBFloat16:
      return body(Type<bfloat16>{});
    default:
      throw std::invalid_argument("dtype: expected float16 or bfloat16, got another");
  }
}

// Calls body(Type<P>{}, Type<T>{}). Both types are float64, or neither is.
template <typename Body>
void with_types(DType param, DType dtype, const Body& body) {
  if (param == DType::kFloat64 && dtype == DType::kFloat64) {
    return body(Type<double>{}, Type<double>{});
  }
  with_single_or_half(param,
                      [&](auto p) { with_single_or_half(dtype, [&](auto t) { body(p, t); }); });
}

// Calls body with a std::integral_constant: the number of tokens that a thread of decode sums.
template <typename Body>
void with_token_tile(int tokens, const Body& body) {
  switch (tokens) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
    default:
      throw std::invalid_argument(
          "decode: expected a call that decode_fits, got M or Rp too large");
  }
}

// Calls body with a std::integral_constant: the smallest compiled number of ranks that is at least
// Rp. Rp is at most kSkinnyRanks.
template <typename Body>
void with_ranks(int Rp, const Body& body) {
  if (Rp <= 48) return body(std::integral_constant<int, 48>{});
  if (Rp <= 96) return body(std::integral_constant<int, 96>{});
  return body(std::integral_constant<int, 160>{});
}

}  // namespace rasa_ext
