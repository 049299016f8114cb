// What every operator over panels does before and around a kernel: checks of tensors, the workspace, the split over
// torch's threads. The operators are linear_ops.cpp's and layer_ops.cpp's.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/linear.h"
#include "tensor_checks.h"

namespace qquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Less than this is not worth waking a thread for. Words read, each counted once per two tokens; activations encoded;
// weights written.
inline constexpr std::int64_t kGrainBytes = std::int64_t{1} << 17, kGrainValues = std::int64_t{1} << 15;
// Workspaces up to here, those of a few tokens, are on the stack: a tensor costs a microsecond.
inline constexpr std::int64_t kStackBytes = std::int64_t{1} << 15;
inline constexpr std::int64_t kLine = 64;

inline std::int32_t code_of(Real dtype) {
  return dtype == Real::float32   ? aoti_torch_dtype_float32()
         : dtype == Real::float16 ? aoti_torch_dtype_float16()
                                  : aoti_torch_dtype_bfloat16();
}

// A contiguous tensor of the CPU, uninitialized. Asked for directly: finding the operator by its name, as
// torch::stable::new_empty does, costs a microsecond, a quarter of a small product.
inline Tensor empty(const std::int64_t* shape, std::int64_t axes, std::int32_t dtype) {
  std::vector<std::int64_t> strides(std::size_t(axes), 1);
  for (std::int64_t axis = axes - 2; axis >= 0; --axis)
    strides[axis] = strides[axis + 1] * std::max<std::int64_t>(1, shape[axis + 1]);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(axes, shape, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor together(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensors of some panels, held for as long as `panels` points into them.
struct HeldPanels {
  Tensor words, scales;
  std::optional<Tensor> zeros;
  Panels panels;
};

inline HeldPanels take_panels(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros, std::int64_t bits,
                       std::int64_t group_size, std::int64_t zero) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  STD_TORCH_CHECK(words.dim() == 3 && words.size(2) == kPanelRows && words.scalar_type() == ScalarType::Int,
                  "words must be [P, S, ", kPanelRows, "] int32, got ", shape_of(words), " ",
                  torch::headeronly::toString(words.scalar_type()));
  const std::int64_t per = 32 / bits, panels = words.size(0), steps = words.size(1);
  STD_TORCH_CHECK(group_size > 0 && group_size % per == 0, "group_size must be a multiple of ", per, " for ", bits,
                  " bits, got ", group_size);
  const std::int64_t groups = (steps * per + group_size - 1) / group_size;
  const ScalarType dtype = scales.scalar_type();
  STD_TORCH_CHECK(
      has_shape(scales, {panels, groups, kPanelRows}) && (dtype == ScalarType::Half || dtype == ScalarType::Float),
      "scales must be [", panels, ", ", groups, ", ", kPanelRows, "] float16 or float32, got ", shape_of(scales), " ",
      torch::headeronly::toString(dtype));
  if (zeros.has_value())
    STD_TORCH_CHECK(
        has_shape(*zeros, {panels, groups, kPanelRows}) && zeros->scalar_type() == ScalarType::Byte, "zeros must be [",
        panels, ", ", groups, ", ", kPanelRows, "] uint8, got ", shape_of(*zeros), " ",
        torch::headeronly::toString(zeros->scalar_type()));
  STD_TORCH_CHECK(0 <= zero && zero <= 256, "zero must be 0 to 256, got ", zero);

  HeldPanels held{together(words), together(scales), std::nullopt, Panels{}};
  if (zeros.has_value()) held.zeros = together(*zeros);
  held.panels.words = static_cast<const std::uint32_t*>(held.words.const_data_ptr());
  held.panels.scales = held.scales.const_data_ptr();
  held.panels.half_scales = dtype == ScalarType::Half;
  held.panels.zeros = held.zeros ? static_cast<const std::uint8_t*>(held.zeros->const_data_ptr()) : nullptr;
  held.panels.zero = std::int32_t(zero);
  held.panels.bits = int(bits);
  held.panels.panels = panels;
  held.panels.steps = steps;
  held.panels.groups = groups;
  held.panels.group = group_size;
  return held;
}

// `order` names columns of x. A product is far more work than this look at each.
inline Tensor take_order(const Tensor& given, std::int64_t columns, std::int64_t features) {
  STD_TORCH_CHECK(has_shape(given, {columns}) && given.scalar_type() == ScalarType::Int, "order must be [", columns,
                  "] int32, got ", shape_of(given), " ", torch::headeronly::toString(given.scalar_type()));
  Tensor order = together(given);
  const auto* const place = static_cast<const std::int32_t*>(order.const_data_ptr());
  std::int32_t largest = -1;
  for (std::int64_t i = 0; i < columns; ++i) largest = std::max(largest, place[i]);
  STD_TORCH_CHECK(largest < features, "order must name columns of x, which has ", features, ", got ", largest);
  return order;
}

// x as rows at an even distance, each side by side; a copy where it is not so.
inline Tensor take_rows(const Tensor& x, Linear& problem) {
  const std::int64_t last = x.dim() - 1, features = x.size(last);
  const auto sizes = x.sizes(), strides = x.strides();
  bool rows = features <= 1 || strides[last] == 1;
  std::int64_t tokens = 1, stride = features;  // of one row: never used
  for (std::int64_t axis = last - 1; axis >= 0; --axis) {
    if (sizes[axis] != 1) {
      if (tokens == 1)
        stride = strides[axis];
      else
        rows = rows && strides[axis] == stride * tokens;
    }
    tokens *= sizes[axis];
  }
  Tensor held = rows ? x : torch::stable::contiguous(x);
  problem.x = held.const_data_ptr();
  problem.tokens = tokens;
  problem.stride = rows ? stride : features;
  return held;
}

inline const LinearKernels& kernels_of(std::int64_t activation_bits, Linear& problem) {
  STD_TORCH_CHECK(activation_bits == -1 || activation_bits == 0 || activation_bits == 8,
                  "activation_bits must be -1, 0 or 8, got ", activation_bits);
  problem.activation_bits = activation_bits == 8 ? 8 : problem.dtype == Real::float32 ? 24 : 16;
  if (activation_bits != -1) return linear_kernels();
  const LinearKernels* const tiles = tile_kernels();
  STD_TORCH_CHECK(tiles != nullptr,
                  "activation_bits -1 needs a processor with avx512_bf16, and QQUANT_CPU_ISA must allow it; use 0");
  STD_TORCH_CHECK(problem.dtype == Real::bfloat16, "activation_bits -1 takes bfloat16 activations; use 0 for others");
  return *tiles;
}

// Calls run(first, last) for ranges of 0..count that begin at multiples of `grain`; on one thread unless each has
// `work_per_grain` of at least `work_per_thread` together.
template <class Run>
void split(std::int64_t count, std::int64_t grain, std::int64_t work_per_grain, std::int64_t work_per_thread,
           const Run& run) {
  const std::int64_t pieces = (count + grain - 1) / grain;
  const std::int64_t least = std::max<std::int64_t>(1, work_per_thread / std::max<std::int64_t>(1, work_per_grain));
  if (pieces <= least) return run(std::int64_t{0}, count);
  torch::stable::parallel_for(0, pieces, least, [&](std::int64_t first, std::int64_t last) {
    run(first * grain, std::min(last * grain, count));
  });
}

inline void compute(const Linear& problem, const LinearKernels& kernels) {
  alignas(kLine) std::uint8_t small[kStackBytes];
  std::uint8_t* workspace = small;
  const std::int64_t bytes = kernels.workspace_bytes(problem);
  std::optional<Tensor> large;
  if (bytes > kStackBytes) {
    const std::int64_t size = bytes + kLine;
    large = empty(&size, 1, aoti_torch_dtype_uint8());
    workspace = static_cast<std::uint8_t*>(large->mutable_data_ptr());
    workspace += (kLine - reinterpret_cast<std::uintptr_t>(workspace) % kLine) % kLine;
  }
  const std::int64_t tokens = kernels.token_grain(problem), panels = kernels.panel_grain(problem);
  const Panels& weight = problem.weight;
  split(problem.tokens, tokens, tokens * weight.columns(), kGrainValues,
        [&](std::int64_t first, std::int64_t last) { kernels.encode(problem, first, last, workspace); });
  const std::int64_t words = panels * weight.steps * kPanelRows * 4 * ((problem.tokens + 1) / 2);
  split(weight.panels, panels, words, kGrainBytes,
        [&](std::int64_t first, std::int64_t last) { kernels.multiply(problem, workspace, first, last); });
}

}  // namespace qquant
