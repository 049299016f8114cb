// float16 and bfloat16 as bits, for code that may not assume a processor's own conversions. Rounds to nearest even.

#pragma once

#include <cstdint>
#include <cstring>

namespace qquant {

// Dtype of what comes from and goes to the model.
enum class Real { float32, float16, bfloat16 };

inline int bytes_of(Real dtype) { return dtype == Real::float32 ? 4 : 2; }

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_bfloat16(std::uint16_t bits) { return float_of(std::uint32_t(bits) << 16); }

inline std::uint16_t to_bfloat16(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_half(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) return float_of(sign | bits_of(float(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + (112u << 23)));  // 112: how far the exponents' biases are apart
}

inline std::uint16_t to_half(float value) {
  const std::uint32_t bits = bits_of(value), rest = bits & 0x7fffffffu;
  const std::uint16_t sign = std::uint16_t(bits >> 16 & 0x8000u);
  if (rest > 0x7f800000u) return sign | 0x7e00u;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;  // from halfway above 65504 on, everything rounds to infinity
  // Below 2^-14 a float16 counts in steps of 2^-24; adding 0.5, whose own last place that is, rounds to them.
  if (rest < 0x38800000u) return sign | std::uint16_t(bits_of(float_of(rest) + 0.5f) - 0x3f000000u);
  return sign | std::uint16_t((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}

inline float load_real(const void* data, std::int64_t index, Real dtype) {
  if (dtype == Real::float32) return static_cast<const float*>(data)[index];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[index];
  return dtype == Real::float16 ? from_half(bits) : from_bfloat16(bits);
}

inline void store_real(void* data, std::int64_t index, float value, Real dtype) {
  if (dtype == Real::float32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<std::uint16_t*>(data)[index] = dtype == Real::float16 ? to_half(value) : to_bfloat16(value);
}

}  // namespace qquant
