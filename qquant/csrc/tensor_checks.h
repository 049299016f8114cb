// What the bindings of the CPU kernels ask of tensors before a kernel sees them. No kernel lives here.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu/half.h"

namespace qquant {

inline Real real_of(torch::headeronly::ScalarType dtype, const char* name) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) return Real::float32;
  if (dtype == ScalarType::Half) return Real::float16;
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, name, " must be float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype), "; convert it first");
  return Real::bfloat16;
}

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::string text = "[";
  for (std::int64_t i = 0; i < tensor.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline bool has_shape(const torch::stable::Tensor& tensor, std::initializer_list<std::int64_t> shape) {
  if (tensor.dim() != std::int64_t(shape.size())) return false;
  std::int64_t axis = 0;
  for (const std::int64_t size : shape)
    if (tensor.size(axis++) != size) return false;
  return true;
}

}  // namespace qquant
