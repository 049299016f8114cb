// Numbers as kernels load and store them: the three float types of a model, and three-byte fixed point.

#pragma once

#include "../qq_cuda.h"
#include "launch.h"

namespace qquant {

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

__device__ __forceinline__ uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

__device__ __forceinline__ float bfloat_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

__device__ __forceinline__ uint16_t float_to_bfloat(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// A model's number: `Bits` of storage and the way to float and back. Words hold as many as fit, the lowest first in
// memory; arrays of 16-bit numbers would be loaded and stored one by one.
struct Float32 {
  using Bits = float;
  static __device__ __forceinline__ float load(float bits) { return bits; }
  static __device__ __forceinline__ float store(float value) { return value; }
};

struct Float16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float load(uint16_t bits) { return half_to_float(bits); }
  static __device__ __forceinline__ uint16_t store(float value) { return float_to_half(value); }
};

struct Bfloat16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float load(uint16_t bits) { return bfloat_to_float(bits); }
  static __device__ __forceinline__ uint16_t store(float value) { return float_to_bfloat(value); }
};

// The words of a vector; the lowest byte of a word is the first in memory.
__device__ __forceinline__ void split(const uint4& v, uint32_t* words) {
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
}

__device__ __forceinline__ void split(const uint2& v, uint32_t* words) {
  words[0] = v.x;
  words[1] = v.y;
}

// Eight numbers from a multiple of 16 bytes on.
template <class Number>
__device__ __forceinline__ void load_eight(const typename Number::Bits* from, float (&values)[8]) {
  constexpr int kWords = int(2 * sizeof(*from));
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; i += 4) split(__ldg(reinterpret_cast<const uint4*>(from) + i / 4), words + i);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if constexpr (kWords == 8) {
      values[i] = __uint_as_float(words[i]);
    } else {
      values[i] = Number::load(uint16_t(words[i / 2] >> (16 * (i % 2))));
    }
  }
}

template <class Number>
__device__ __forceinline__ void store_eight(typename Number::Bits* to, const float (&values)[8]) {
  constexpr int kWords = int(2 * sizeof(*to));
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (kWords == 8) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i] = uint32_t(Number::store(values[2 * i])) | uint32_t(Number::store(values[2 * i + 1])) << 16;
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; i += 4)
    __stwb(reinterpret_cast<uint4*>(to) + i / 4, uint4{words[i], words[i + 1], words[i + 2], words[i + 3]});
}

// Elements `index` to `index` + 3 of an array whose dtype is known only at run time; `index` is a multiple of 4.
__device__ __forceinline__ void load_four(const void* array, int64_t index, int32_t dtype, float (&values)[4]) {
  if (dtype == kQqFloat32) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(static_cast<const float*>(array) + index));
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(words[i]);
  } else {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(array) + index));
    const uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t bits = uint16_t(words[i / 2] >> (16 * (i % 2)));
      values[i] = dtype == kQqFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
    }
  }
}

// One element likewise, stored.
__device__ __forceinline__ void store_any(void* array, int64_t index, int32_t dtype, float value) {
  if (dtype == kQqFloat32) {
    static_cast<float*>(array)[index] = value;
  } else {
    static_cast<uint16_t*>(array)[index] = dtype == kQqFloat16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

// Transposes a 4 x 4 square of bytes: byte j of word i becomes byte i of word j.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
  const uint32_t low01 = __byte_perm(w[0], w[1], 0x5140), high01 = __byte_perm(w[0], w[1], 0x7362);
  const uint32_t low23 = __byte_perm(w[2], w[3], 0x5140), high23 = __byte_perm(w[2], w[3], 0x7362);
  w[0] = __byte_perm(low01, low23, 0x5410);
  w[1] = __byte_perm(low01, low23, 0x7632);
  w[2] = __byte_perm(high01, high23, 0x5410);
  w[3] = __byte_perm(high01, high23, 0x7632);
}

// Unit and inverse of 24-bit unsigned fixed point for numbers up to `largest`: powers of two, so that neither scaling
// rounds. Where all numbers are next to nothing, both are 0.
struct Fixed {
  float unit, inverse;
};

__device__ __forceinline__ Fixed unsigned_fixed_point(float largest) {
  if (!(largest >= 7.8886091e-31f)) return {0.0f, 0.0f};  // 2^-100: unit and inverse stay normal numbers
  const uint32_t exponent = __float_as_uint(largest) & 0x7F800000u, shift = 23u << 23;
  return {__uint_as_float(exponent - shift), __uint_as_float((254u << 23) + shift - exponent)};
}

// The same for signed numbers, cut into three bytes from -128 to 127 each: as far as those reach.
constexpr float kMaxSigned = 127 * 65536 + 127 * 256 + 127;

__device__ __forceinline__ Fixed signed_fixed_point(float largest) {
  if (!(largest >= 7.8886091e-31f)) return {0.0f, 0.0f};
  return {largest / kMaxSigned, kMaxSigned / largest};
}

// The three bytes of a signed number, lowest first, in one word.
__device__ __forceinline__ uint32_t signed_bytes(int32_t number) { return uint32_t(number + 0x808080) ^ 0x808080u; }

}  // namespace qquant
