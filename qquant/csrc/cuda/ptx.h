// The PTX instructions in use, each beside its meaning in C++, which the CPU shim runs: products of bytes on the tensor
// cores, exact in int32; a power of two that needs no care for the smallest numbers; copies from global to shared
// memory that need no register and are waited for later. Everything around them is ordinary CUDA C++.
//
// Lanes share the operands of mma as the fragment layout of the PTX manual (mma.m16n8k32, 8-bit integers) says: 16 x 8
// sums of 32 products each. With g = lane / 4 and t = lane % 4, byte i of a register, lowest first:
//   a[0] row g, columns 4t + i; a[1] row g + 8, same columns; a[2], a[3] likewise, columns 16 + 4t + i
//   b[0] rows 4t + i, column g; b[1] rows 16 + 4t + i
//   c[0], c[1] row g, columns 2t and 2t + 1; c[2], c[3] row g + 8

#pragma once

#include "../qq_cuda.h"

namespace qquant {

#if defined(__CUDACC__)

#define QQ_MMA(types)                                  \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." types   \
      ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
      "{%0,%1,%2,%3};"                                 \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// c += a * b; the bytes of b are unsigned, those of a signed where kSigned.
template <bool kSigned>
__device__ __forceinline__ void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kSigned) {
    QQ_MMA("s8.u8");
  } else {
    QQ_MMA("u8.u8");
  }
}

#undef QQ_MMA

// 2^x to 2 units in the last place; 0 where that is below 2^-126.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Starts copying kBytes, 8 or 16, to shared memory; both addresses are multiples of kBytes. Where `wanted` is 0 and not
// kBytes, nothing is read and zeros are written. What is started belongs to the group that the thread closes next.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, uint32_t wanted) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(wanted) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(from), "r"(wanted) : "memory");
  }
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until this thread's groups are there, but for the youngest kLeft. Other threads' need a barrier after it.
template <int kLeft>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#else

// Nothing is copied before it is waited for, so that a missing wait shows.
template <int kBytes>
inline void copy_async(void* to, const void* from, uint32_t wanted) {
  using Bytes = emu::Bytes<kBytes>;
  emu::self().started.push_back(
      [to, from, wanted] { *static_cast<Bytes*>(to) = wanted == 0 ? Bytes() : *static_cast<const Bytes*>(from); });
}

inline void close_group() {
  emu::self().groups.push_back(std::move(emu::self().started));
  emu::self().started.clear();
}

template <int kLeft>
inline void wait_for_groups() {
  auto& groups = emu::self().groups;
  for (; groups.size() > size_t(kLeft); groups.pop_front())
    for (const auto& copy : groups.front()) copy();
}

inline float power_of_two(float x) {
  const float result = std::exp2(x);
  return result < 1.17549435e-38f ? 0.0f : result;
}

template <bool kSigned>
inline void mma(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const emu::Shared all = emu::exchange(0xFFFFFFFFu, kSigned ? "mma s8 u8" : "mma u8 u8", mine, 6);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      const int from = (k % 16) / 4, half = k / 16, shift = 8 * (k % 4);
      const uint32_t left = all[4 * g + from][2 * half + row] >> shift & 0xFFu;
      const uint32_t right = all[4 * column + from][4 + half] >> shift & 0xFFu;
      c[i] += (kSigned ? int(int8_t(left)) : int(left)) * int(right);
    }
  }
}

#endif

}  // namespace qquant
