// Products of few activations with a plain bfloat16 weight as nn.Linear keeps it: the contract of the kernels behind
// dense_linear. They read the weight once for all tokens, at the memory's pace.
//
// Products are summed in float32 and rounded once to bfloat16. The order of the sums depends on the instruction set and
// the number of columns only: not on how many tokens or rows are asked for, nor on threads. NaN and infinities go where
// the sums take them. AVX-512 BF16 (vdpbf16ps) reads denormal inputs as zero and flushes denormal sums.
//
// Nothing here knows of torch.

#pragma once

#include <algorithm>
#include <cstdint>

#include "half.h"

namespace qquant {

constexpr std::int64_t kDenseTokens = 8;
constexpr std::int64_t kDenseLine = 32;  // columns of a 64-byte line

struct Dense {
  const std::uint16_t* x;  // [columns / kDenseLine, rounded up][tokens][kDenseLine], see pack_lines
  std::int64_t tokens;     // 1 to kDenseTokens
  const std::uint16_t* weight;  // [rows][weight_stride]
  std::int64_t rows, columns, weight_stride;
  const void* bias;  // [rows] of bias_dtype, or null
  Real bias_dtype;
  std::uint16_t* out;  // [tokens][rows]
};

// Computes rows first to last - 1 of the weight, for all tokens. Ranges may be computed side by side.
using DenseKernel = void (*)(const Dense&, std::int64_t first, std::int64_t last);

// The kernel for the instruction set that isa() names.
DenseKernel dense_kernel();

extern const DenseKernel kDensePortable, kDenseAvx2, kDenseAvx512, kDenseAvx512Bf16;

// Where the activation of a column lies.
inline std::int64_t place_of(std::int64_t tokens, std::int64_t token, std::int64_t column) {
  return (column / kDenseLine * tokens + token) * kDenseLine + column % kDenseLine;
}

// Lays tokens that are `stride` apart side by side, line by line: as they come, a power of two apart, they would drive
// each other and the weights out of the first-level cache. Numbers past the last column are nobody's and not written.
inline void pack_lines(const std::uint16_t* x, std::int64_t tokens, std::int64_t stride, std::int64_t columns,
                       std::uint16_t* to) {
  for (std::int64_t k = 0; k < columns; k += kDenseLine)
    for (std::int64_t token = 0; token < tokens; ++token)
      std::copy_n(x + token * stride + k, std::min(kDenseLine, columns - k), to + place_of(tokens, token, k));
}

inline void store_dense(const Dense& problem, std::int64_t token, std::int64_t row, float sum) {
  if (problem.bias != nullptr) sum += load_real(problem.bias, row, problem.bias_dtype);
  problem.out[token * problem.rows + row] = to_bfloat16(sum);
}

}  // namespace qquant
