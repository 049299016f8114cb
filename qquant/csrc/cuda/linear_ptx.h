// The PTX instructions of the packed linears, each beside its meaning in C++, which the CPU shim runs: products of
// 16-bit floats on the tensor cores, sums of pairs of them, and copies that tell the GPU's caches what will be read
// again. ptx.h holds what they share with the KV cache.
//
// Lanes share the operands of mma as the fragment layout of the PTX manual (mma.m16n8k16, 16-bit floats) says: 16 x 8
// sums of 16 products each. With g = lane / 4 and t = lane % 4, the low half of a register first:
//   a[0] row g, columns 2t and 2t + 1; a[1] row g + 8, same columns; a[2], a[3] likewise, columns 2t + 8 and 2t + 9
//   b[0] rows 2t and 2t + 1, column g; b[1] rows 2t + 8 and 2t + 9
//   c[0], c[1] row g, columns 2t and 2t + 1; c[2], c[3] row g + 8

#pragma once

#include <type_traits>

#include "numbers.h"
#include "ptx.h"

namespace qquant {

#if defined(__CUDACC__)

#define QQ_MMA(type)                                   \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type    \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
      "{%0,%1,%2,%3};"                                 \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// c += a * b in float32; a and b hold Number, Float16 or Bfloat16.
template <class Number>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same<Number, Float16>::value) {
    QQ_MMA("f16.f16");
  } else {
    QQ_MMA("bf16.bf16");
  }
}

#undef QQ_MMA

// Both halves of a plus both halves of b, rounded to nearest.
template <class Number>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  uint32_t sum;
  if constexpr (std::is_same<Number, Float16>::value) {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  } else {
    // Before 9.0 a bfloat16 can be added only in a fused product; this one is with 1.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
  }
  return sum;
}

// word & mask | power in one instruction: written in C++, constants that are both known make it two.
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t power) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(power));
  return result;
}

// Tells the second-level cache that what a copy reads is the first to go.
__device__ __forceinline__ uint64_t once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// copy_async<16>, which leaves nothing in the first-level cache, with a policy for the second.
__device__ __forceinline__ void copy_async_once(void* to, const void* from, uint32_t wanted, uint64_t policy) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(address), "l"(from),
               "r"(wanted), "l"(policy)
               : "memory");
}

// copy_async<16> that the first-level cache keeps, for what other warps read too.
__device__ __forceinline__ void copy_async_shared(void* to, const void* from, uint32_t wanted) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(wanted) : "memory");
}

// 16 bytes that nobody reads again.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
}

#else

template <class Number>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool kHalf = std::is_same<Number, Float16>::value;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const emu::Shared all = emu::exchange(0xFFFFFFFFu, kHalf ? "mma f16" : "mma bf16", mine, 6);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2, high = k / 8, shift = 16 * (k % 2);
      const uint16_t left = uint16_t(all[4 * g + from][2 * high + row] >> shift);
      const uint16_t right = uint16_t(all[4 * column + from][4 + high] >> shift);
      c[i] += Number::load(left) * Number::load(right);
    }
  }
}

template <class Number>
inline uint32_t add_pairs(uint32_t a, uint32_t b) {
  const auto sum = [&](int shift) {
    return uint32_t(Number::store(Number::load(uint16_t(a >> shift)) + Number::load(uint16_t(b >> shift))));
  };
  return sum(0) | sum(16) << 16;
}

inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t power) { return (word & mask) | power; }

inline uint64_t once_policy() { return 0; }

inline void copy_async_once(void* to, const void* from, uint32_t wanted, uint64_t) { copy_async<16>(to, from, wanted); }

inline void copy_async_shared(void* to, const void* from, uint32_t wanted) { copy_async<16>(to, from, wanted); }

inline uint4 load_once(const uint4* from) { return *from; }

#endif

}  // namespace qquant
