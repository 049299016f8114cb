// Codes as the tensor cores take them: pairs of whole numbers code - zero, exact in float16 and bfloat16, and the
// scales and zeros of a group. Scales are left to the sums, which are float32.
//
// A code is put into the last bits of a float that is a power of two, 1024, 128 or 2^23; one addition then takes away
// that power and the zero together. Zeros are at most 2^bits, so both numbers, and their difference, are exact.

#pragma once

#include <type_traits>

#include "linear_launch.h"
#include "linear_ptx.h"

namespace qquant {

constexpr float kMagic = 8388608.0f;  // 2^23: the last bit of a float32 there is 1
constexpr uint32_t kMagicBits = 0x4B000000u;

// Code `index` of a word, less a zero that comes as kMagic + zero.
template <int kBits>
__device__ __forceinline__ float centred(uint32_t word, int index, float magic_zero) {
  const uint32_t code = word >> (kBits * index) & ((1u << kBits) - 1);
  return __fsub_rn(__uint_as_float(kMagicBits | code), magic_zero);
}

// What is added to a code with its power of two, for both halves of a register; for 8-bit codes as bfloat16, which has
// too few bits for a power above them, 2^23 plus the zero as float32.
template <class Number, int kBits>
__device__ __forceinline__ uint32_t offset_of(uint32_t zero) {
  if constexpr (std::is_same<Number, Float16>::value) {
    return (0xE400u + zero) * 0x10001u;  // -(1024 + zero)
  } else if constexpr (kBits == 4) {
    return (0xC300u + zero) * 0x10001u;  // -(128 + zero)
  } else {
    return __float_as_uint(kMagic + float(zero));
  }
}

// The eight codes of one row and 8 columns as four registers of two numbers. words: the row's, kBits / 4 of them. Which
// columns share a register is pair_up's business too.
template <class Number, int kBits>
__device__ __forceinline__ void to_pairs(const uint32_t* words, uint32_t offset, uint32_t (&pairs)[4]) {
  constexpr bool kHalf = std::is_same<Number, Float16>::value;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBits == 4) {
      constexpr uint32_t kPower = kHalf ? 0x64006400u : 0x43004300u;
      pairs[i] = add_pairs<Number>(and_or(words[0] >> (4 * i), 0x000F000Fu, kPower), offset);
    } else if constexpr (kHalf) {
      pairs[i] = add_pairs<Number>(__byte_perm(words[i / 2], 0x64u, i % 2 == 0 ? 0x4140 : 0x4342), offset);
    } else {
      float value[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t selector = 0x7440u + 2u * (i % 2) + j;
        value[j] =
            __fsub_rn(__uint_as_float(__byte_perm(words[i / 2], kMagicBits, selector)), __uint_as_float(offset));
      }
      // Whole numbers up to 256: the lower halves are 0.
      pairs[i] = __byte_perm(__float_as_uint(value[0]), __float_as_uint(value[1]), 0x7632);
    }
  }
}

// Eight neighbouring activations, put in the order of to_pairs: 4-bit codes i and i + 4 lie 16 bits apart.
template <int kBits>
__device__ __forceinline__ void pair_up(const uint4& v, uint32_t (&pairs)[4]) {
  if constexpr (kBits == 4) {
    pairs[0] = __byte_perm(v.x, v.z, 0x5410);
    pairs[1] = __byte_perm(v.x, v.z, 0x7632);
    pairs[2] = __byte_perm(v.y, v.w, 0x5410);
    pairs[3] = __byte_perm(v.y, v.w, 0x7632);
  } else {
    split(v, pairs);
  }
}

// Scales of four neighbouring rows of a panel in one group, as they are stored. at: of the first of them in scales and
// zeros, (panel * groups + group) * 16 + row, a multiple of 4.
struct RowScales {
  uint4 stored;

  __device__ __forceinline__ void load(const QqPanels& weight, int64_t at) {
    if (weight.half_scales) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(weight.scales) + at));
      stored = uint4{v.x, v.y, 0, 0};
    } else {
      stored = __ldg(reinterpret_cast<const uint4*>(static_cast<const float*>(weight.scales) + at));
    }
  }

  __device__ __forceinline__ void values(const QqPanels& weight, float (&to)[4]) const {
    uint32_t words[4];
    split(stored, words);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[i] = weight.half_scales ? half_to_float(uint16_t(words[i / 2] >> (16 * (i % 2)))) : __uint_as_float(words[i]);
  }
};

// Their zeros, a byte each where every group has its own.
__device__ __forceinline__ uint32_t load_zeros(const QqPanels& weight, int64_t at) {
  return weight.zeros != nullptr ? __ldg(reinterpret_cast<const uint32_t*>(weight.zeros + at)) : 0u;
}

__device__ __forceinline__ uint32_t zero_of(const QqPanels& weight, uint32_t zeros, int row) {
  return weight.zeros != nullptr ? zeros >> (8 * row) & 0xFFu : uint32_t(weight.zero);
}

}  // namespace qquant
