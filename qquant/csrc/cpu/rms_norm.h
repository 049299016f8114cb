// The norm of a decoder's residual stream, bit for bit as torch's own operators compute it one after another:
//   out = weight * bfloat16(x * (1 / sqrt(mean(x^2) + eps)))
// everything but the last product in float32, that one rounded to bfloat16 again. Nothing here knows of torch.

#pragma once

#include <cstdint>

namespace qquant {

struct RmsNorm {
  const std::uint16_t* x;       // [rows][stride] bfloat16
  const std::uint16_t* weight;  // [size] bfloat16
  std::uint16_t* out;           // [rows][size] bfloat16
  std::int64_t stride, size;
  float eps;
};

// Rows first to last - 1.
void normalize(const RmsNorm& norm, std::int64_t first, std::int64_t last);

}  // namespace qquant
