// The steps of layer_step.h, written once for any compiler and compiled for each instruction set: plain loops.

#include "layer_step.h"

#include <cmath>
#include <limits>

#include "half.h"
#include "isa.h"

// A product fused into a sum rounds once where torch rounds twice.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#if !QQ_X86
#define QQ_INLINE inline
#endif

namespace qquant {

namespace {

QQ_INLINE float rounded(float value) { return from_bfloat16(to_bfloat16(value)); }

QQ_INLINE void rotate_heads(std::uint16_t* __restrict states, const std::uint16_t* __restrict cos,
                            const std::uint16_t* __restrict sin, std::int64_t heads, std::int64_t size) {
  const std::int64_t half = size / 2;
  for (std::int64_t head = 0; head < heads; ++head) {
    std::uint16_t* const low = states + head * size;
    std::uint16_t* const high = low + half;
    for (std::int64_t i = 0; i < half; ++i) {
      const float first = from_bfloat16(low[i]), second = from_bfloat16(high[i]);
      low[i] = to_bfloat16(rounded(first * from_bfloat16(cos[i])) + rounded(-second * from_bfloat16(sin[i])));
      high[i] =
          to_bfloat16(rounded(second * from_bfloat16(cos[half + i])) + rounded(first * from_bfloat16(sin[half + i])));
    }
  }
}

QQ_INLINE void rotate_heads_wide(std::uint16_t* states, const float* __restrict cos, const float* __restrict sin,
                                 std::int64_t heads, std::int64_t size, std::int64_t half) {
  for (std::int64_t head = 0; head < heads; ++head) {
    std::uint16_t* const low = states + head * size;
    std::uint16_t* const high = low + half;
    for (std::int64_t i = 0; i < half; ++i) {
      const float first = from_bfloat16(low[i]), second = from_bfloat16(high[i]);
      low[i] = to_bfloat16(std::fma(-second, sin[i], first * cos[i]));
      high[i] = to_bfloat16(std::fma(first, sin[i], second * cos[i]));
    }
  }
}

// exp(-x) to the last bit or the one before it; what a float32 cannot hold is infinite, what is below 2^-126 may be 0.
// Of NaN some number. Beyond 89 either way nothing changes any more; the bound is on bits, because GCC makes no vectors
// of loops that compare floats.
QQ_INLINE float exponential_of_minus(float x) {
  constexpr std::int32_t kBound = 0x42b20000;  // of 89.0f
  const std::int32_t size = std::int32_t(bits_of(x) & 0x7fffffffu);
  const std::uint32_t minus = ~bits_of(x) & 0x80000000u;
  const float bounded = float_of(std::uint32_t(size < kBound ? size : kBound) | minus);
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  const float shifted = bounded * 1.44269504f + kShift;
  const float whole = shifted - kShift;
  const float rest = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts
  float sum = 1.0f / 5040.0f;
  sum = sum * rest + 1.0f / 720.0f;
  sum = sum * rest + 1.0f / 120.0f;
  sum = sum * rest + 1.0f / 24.0f;
  sum = sum * rest + 1.0f / 6.0f;
  sum = sum * rest + 0.5f;
  sum = sum * rest * rest + rest + 1.0f;
  // 2^whole in two factors, because 2^128 is not a number of this kind and exp(88.7) is.
  const std::int32_t power = std::int32_t(bits_of(shifted)) - std::int32_t(0x4b400000);
  const std::int32_t part = power >> 1;
  const float one = float_of(std::uint32_t(part + 127) << 23), other = float_of(std::uint32_t(power - part + 127) << 23);
  return sum * one * other;
}

QQ_INLINE void silu_products(const std::uint16_t* gate, const std::uint16_t* up, std::uint16_t* out,
                             std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = from_bfloat16(gate[i]);
    out[i] = to_bfloat16(rounded(value / (1.0f + exponential_of_minus(value))) * from_bfloat16(up[i]));
  }
}

QQ_INLINE void add_all(std::uint16_t* to, const std::uint16_t* from, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(from_bfloat16(to[i]) + from_bfloat16(from[i]));
}

#if QQ_X86
QQ_AVX512_PLAIN void rotate_avx512(std::uint16_t* states, const std::uint16_t* cos, const std::uint16_t* sin,
                                   std::int64_t heads, std::int64_t size) {
  rotate_heads(states, cos, sin, heads, size);
}

QQ_AVX512_PLAIN void rotate_wide_avx512(std::uint16_t* states, const float* cos, const float* sin, std::int64_t heads,
                                        std::int64_t size, std::int64_t half) {
  rotate_heads_wide(states, cos, sin, heads, size, half);
}

QQ_AVX512_PLAIN void silu_avx512(const std::uint16_t* gate, const std::uint16_t* up, std::uint16_t* out,
                                 std::int64_t count) {
  silu_products(gate, up, out, count);
}

QQ_AVX512_PLAIN void add_avx512(std::uint16_t* to, const std::uint16_t* from, std::int64_t count) {
  add_all(to, from, count);
}

QQ_AVX2 void rotate_avx2(std::uint16_t* states, const std::uint16_t* cos, const std::uint16_t* sin, std::int64_t heads,
                         std::int64_t size) {
  rotate_heads(states, cos, sin, heads, size);
}

QQ_AVX2 void rotate_wide_avx2(std::uint16_t* states, const float* cos, const float* sin, std::int64_t heads,
                              std::int64_t size, std::int64_t half) {
  rotate_heads_wide(states, cos, sin, heads, size, half);
}

QQ_AVX2 void silu_avx2(const std::uint16_t* gate, const std::uint16_t* up, std::uint16_t* out, std::int64_t count) {
  silu_products(gate, up, out, count);
}

QQ_AVX2 void add_avx2(std::uint16_t* to, const std::uint16_t* from, std::int64_t count) { add_all(to, from, count); }
#endif

}  // namespace

void rotate(std::uint16_t* states, const std::uint16_t* cos, const std::uint16_t* sin, std::int64_t heads,
            std::int64_t size) {
#if QQ_X86
  if (isa() >= Isa::avx512) return rotate_avx512(states, cos, sin, heads, size);
  if (isa() >= Isa::avx2) return rotate_avx2(states, cos, sin, heads, size);
#endif
  rotate_heads(states, cos, sin, heads, size);
}

void rotate_wide(std::uint16_t* states, const float* cos, const float* sin, std::int64_t heads, std::int64_t size,
                 std::int64_t half) {
#if QQ_X86
  if (isa() >= Isa::avx512) return rotate_wide_avx512(states, cos, sin, heads, size, half);
  if (isa() >= Isa::avx2) return rotate_wide_avx2(states, cos, sin, heads, size, half);
#endif
  rotate_heads_wide(states, cos, sin, heads, size, half);
}

void silu_product(const std::uint16_t* gate, const std::uint16_t* up, std::uint16_t* out, std::int64_t count) {
#if QQ_X86
  if (isa() >= Isa::avx512) return silu_avx512(gate, up, out, count);
  if (isa() >= Isa::avx2) return silu_avx2(gate, up, out, count);
#endif
  silu_products(gate, up, out, count);
}

void add_to(std::uint16_t* to, const std::uint16_t* from, std::int64_t count) {
#if QQ_X86
  if (isa() >= Isa::avx512) return add_avx512(to, from, count);
  if (isa() >= Isa::avx2) return add_avx2(to, from, count);
#endif
  add_all(to, from, count);
}

}  // namespace qquant
