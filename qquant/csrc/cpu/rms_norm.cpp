// The norm, written once for any compiler and compiled for each instruction set: its loops are over whole vectors.
//
// torch sums a row in vectors of 8 numbers, four vectors side by side, in stretches of 16 or more that are added up
// level by level so that rounding errors stay small; what fills no vector is added to the sum first. This order is
// repeated here, whatever the instruction set, because float32 sums in another one differ in their last bit.

#include "rms_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

constexpr int kLanes = 8, kLevels = 4, kSideBySide = 4;

struct Vector {
  float at[kLanes];
};

QQ_INLINE void add(Vector& to, const float* from) {
  for (int i = 0; i < kLanes; ++i) to.at[i] += from[i];
}

// Sum of `count` numbers in torch's order.
QQ_INLINE float sum_as_torch(const float* values, std::int64_t count) {
  const std::int64_t vectors = count / kLanes, rounds = vectors / kSideBySide;
  int power = 0;
  while ((std::int64_t{1} << power) < rounds) ++power;
  power = std::max(4, power / kLevels);
  const std::int64_t step = std::int64_t{1} << power;
  Vector sums[kLevels][kSideBySide] = {};
  std::int64_t done = 0;
  while (done + step <= rounds) {
    for (std::int64_t i = 0; i < step; ++i, ++done)
      for (int k = 0; k < kSideBySide; ++k) add(sums[0][k], values + (done * kSideBySide + k) * kLanes);
    for (int level = 1; level < kLevels; ++level) {
      for (int k = 0; k < kSideBySide; ++k) {
        add(sums[level][k], sums[level - 1][k].at);
        sums[level - 1][k] = {};
      }
      if ((done & ((step - 1) << (level * power))) != 0) break;
    }
  }
  for (; done < rounds; ++done)
    for (int k = 0; k < kSideBySide; ++k) add(sums[0][k], values + (done * kSideBySide + k) * kLanes);
  for (int level = 1; level < kLevels; ++level)
    for (int k = 0; k < kSideBySide; ++k) add(sums[0][k], sums[level][k].at);
  for (std::int64_t i = rounds * kSideBySide; i < vectors; ++i) add(sums[0][0], values + i * kLanes);
  for (int k = 1; k < kSideBySide; ++k) add(sums[0][0], sums[0][k].at);
  float total = 0.0f;
  for (std::int64_t i = vectors * kLanes; i < count; ++i) total += values[i];
  for (int i = 0; i < kLanes; ++i) total += sums[0][0].at[i];
  return total;
}

QQ_INLINE void normalize_row(const std::uint16_t* x, const RmsNorm& norm, float* values, float* squares,
                             std::uint16_t* out) {
  for (std::int64_t i = 0; i < norm.size; ++i) {
    values[i] = from_bfloat16(x[i]);
    squares[i] = values[i] * values[i];
  }
  const float mean = sum_as_torch(squares, norm.size) / float(norm.size);
  const float inverse = 1.0f / std::sqrt(mean + norm.eps);
  for (std::int64_t i = 0; i < norm.size; ++i)
    out[i] = to_bfloat16(from_bfloat16(norm.weight[i]) * from_bfloat16(to_bfloat16(values[i] * inverse)));
}

QQ_INLINE void normalize_rows(const RmsNorm& norm, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kOnStack = 8192;
  float on_stack[2 * kOnStack];
  std::vector<float> beyond(norm.size > kOnStack ? 2 * norm.size : 0);
  float* const values = beyond.empty() ? on_stack : beyond.data();
  for (std::int64_t row = first; row < last; ++row)
    normalize_row(norm.x + row * norm.stride, norm, values, values + norm.size, norm.out + row * norm.size);
}

#if QQ_X86
QQ_AVX512_PLAIN void normalize_avx512(const RmsNorm& norm, std::int64_t first, std::int64_t last) {
  normalize_rows(norm, first, last);
}

QQ_AVX2 void normalize_avx2(const RmsNorm& norm, std::int64_t first, std::int64_t last) {
  normalize_rows(norm, first, last);
}
#endif

void normalize_portable(const RmsNorm& norm, std::int64_t first, std::int64_t last) {
  normalize_rows(norm, first, last);
}

}  // namespace

void normalize(const RmsNorm& norm, std::int64_t first, std::int64_t last) {
#if QQ_X86
  if (isa() >= Isa::avx512) return normalize_avx512(norm, first, last);
  if (isa() >= Isa::avx2) return normalize_avx2(norm, first, last);
#endif
  normalize_portable(norm, first, last);
}

}  // namespace qquant
