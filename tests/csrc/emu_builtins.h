// CUDA's own names, as far as the kernels use them, in the meaning of emu.h: qualifiers, vectors, warp functions,
// rounding and conversion. Must be compiled with -ffp-contract=off, so that nothing is fused that the kernels keep
// apart.

#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (emu::self().index)
#define blockIdx (emu::machine().block_index)
#define blockDim (emu::machine().block)
#define gridDim (emu::machine().grid)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

template <class To, class From>
inline To emu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline void __syncthreads() { emu::block_barrier(); }

inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) {
  const uint32_t nothing = 0;
  emu::exchange(mask, "__syncwarp", &nothing, 1);
}

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source) {
  const uint32_t word = emu_bits<uint32_t>(value);
  return emu_bits<T>(emu::exchange(mask, "__shfl_sync", &word, 1)[source % emu::kWarp][0]);
}

template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int other) {
  const uint32_t word = emu_bits<uint32_t>(value);
  const emu::Shared all = emu::exchange(mask, "__shfl_xor_sync", &word, 1);
  return emu_bits<T>(all[emu::lane() ^ other][0]);
}

inline int __all_sync(uint32_t mask, int condition) {
  const uint32_t word = condition != 0;
  const emu::Shared all = emu::exchange(mask, "__all_sync", &word, 1);
  for (int i = 0; i < emu::kWarp; ++i)
    if ((mask >> i & 1u) && all[i][0] == 0) return 0;
  return 1;
}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

template <class T>
inline void __stwb(T* address, T value) {
  *address = value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }

// The GPU's conversions saturate, and make 0 of what is not a number.
inline int32_t __float2int_rn(float a) {
  if (std::isnan(a)) return 0;
  return a >= 2147483648.0f ? INT32_MAX : a <= -2147483648.0f ? INT32_MIN : int32_t(std::lrintf(a));
}
inline uint32_t __float2uint_rn(float a) {
  if (std::isnan(a) || a <= 0.0f) return 0;
  return a >= 4294967296.0f ? UINT32_MAX : uint32_t(std::llrintf(a));
}

inline uint32_t __float_as_uint(float a) { return emu_bits<uint32_t>(a); }
inline float __uint_as_float(uint32_t a) { return emu_bits<float>(a); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
  return result;
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half a) { return a.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }

inline float __half2float(__half a) {
  const uint32_t sign = uint32_t(a.bits & 0x8000u) << 16, rest = a.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return emu_bits<float>(sign | 0x7F800000u | rest << 13);
  // The exponents differ by 112; a product with 2^112 also makes normal numbers of the small ones.
  const float value = emu_bits<float>(rest << 13) * 5.192296858534828e33f;
  return emu_bits<float>(emu_bits<uint32_t>(value) | sign);
}

inline __half __float2half_rn(float a) {
  const uint32_t bits = emu_bits<uint32_t>(a), sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
  if (rest > 0x7F800000u) return {uint16_t(0x7FFFu)};
  if (rest >= 0x477FF000u) return {uint16_t(sign | 0x7C00u)};  // 65520 and more
  if (rest < 0x38800000u) {                                    // below 2^-14: whole steps of 2^-24, rounded by lrint
    return {uint16_t(sign | uint32_t(std::lrintf(emu_bits<float>(rest) * 16777216.0f)))};
  }
  const uint32_t rebased = rest - 0x38000000u;
  return {uint16_t(sign | (rebased + 0xFFFu + (rebased >> 13 & 1u)) >> 13)};
}

inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  const uint32_t bits = emu_bits<uint32_t>(a);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {uint16_t(0x7FFFu)};
  return {uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
