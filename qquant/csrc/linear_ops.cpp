// Binds the kernels of cpu/linear.h and cpu/linear_weights.h to the operators that linear_ops.py declares. Checks of
// what a kernel cannot take, the workspace and the split over torch's threads live here; the kernels know nothing of
// torch.

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <vector>

#include "cpu/linear.h"
#include "cpu/linear_weights.h"
#include "panel_tensors.h"

namespace {

using qquant::compute;
using qquant::empty;
using qquant::has_shape;
using qquant::HeldPanels;
using qquant::kGrainValues;
using qquant::kPanelRows;
using qquant::Linear;
using qquant::LinearKernels;
using qquant::Real;
using qquant::shape_of;
using qquant::split;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<Tensor> panel_linear(const Tensor& x, const Tensor& words, const Tensor& scales,
                                 const std::optional<Tensor>& zeros, const std::optional<Tensor>& order,
                                 const std::optional<Tensor>& bias, std::vector<std::int64_t> widths, std::int64_t bits,
                                 std::int64_t group_size, std::int64_t zero, std::int64_t activation_bits) {
  const HeldPanels held = qquant::take_panels(words, scales, zeros, bits, group_size, zero);
  Linear problem{};
  problem.weight = held.panels;
  const std::int64_t panels = held.panels.panels, columns = held.panels.columns();
  problem.dtype = qquant::real_of(x.scalar_type(), "x");
  const std::int64_t features = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
  std::optional<Tensor> held_order, held_bias;
  if (order.has_value()) {
    STD_TORCH_CHECK(x.dim() > 0, "x must have an axis of features");
    held_order = qquant::take_order(*order, columns, features);
    problem.order = static_cast<const std::int32_t*>(held_order->const_data_ptr());
  } else {
    STD_TORCH_CHECK(x.dim() > 0 && features == columns, "x must end in ", columns, " features, got ", features);
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(has_shape(*bias, {panels * kPanelRows}) && bias->scalar_type() == ScalarType::Float,
                    "bias must be [", panels * kPanelRows, "] float32, got ", shape_of(*bias), " ",
                    torch::headeronly::toString(bias->scalar_type()));
    held_bias = qquant::together(*bias);
    problem.bias = static_cast<const float*>(held_bias->const_data_ptr());
  }
  std::int64_t wanted = 0;
  bool positive = true;
  for (const std::int64_t width : widths) {
    positive = positive && width > 0;
    wanted += positive ? (width + kPanelRows - 1) / kPanelRows : 0;
  }
  STD_TORCH_CHECK(positive && wanted == panels && !widths.empty(), "outputs need ", wanted,
                  " panels and at least one feature each, got ", panels, " panels");
  const LinearKernels& kernels = qquant::kernels_of(activation_bits, problem);

  const Tensor rows = qquant::take_rows(x, problem);
  const auto sizes = x.sizes();
  std::vector<std::int64_t> shape(sizes.begin(), sizes.end());
  std::vector<Tensor> results;
  std::vector<qquant::Slice> slices;
  results.reserve(widths.size());
  slices.reserve(widths.size());
  std::int64_t panel = 0;
  for (const std::int64_t width : widths) {
    shape.back() = width;
    results.push_back(empty(shape.data(), std::int64_t(shape.size()), qquant::code_of(problem.dtype)));
    slices.push_back({results.back().mutable_data_ptr(), panel, width});
    panel += (width + kPanelRows - 1) / kPanelRows;
  }
  problem.slices = slices.data();
  problem.slice_count = std::int64_t(slices.size());
  if (problem.tokens > 0) compute(problem, kernels);
  return results;
}

Tensor panel_weights(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros, std::int64_t bits,
                     std::int64_t group_size, std::int64_t zero, ScalarType dtype) {
  const Real real = qquant::real_of(dtype, "dtype");
  const HeldPanels held = qquant::take_panels(words, scales, zeros, bits, group_size, zero);
  const std::int64_t panels = held.panels.panels, columns = held.panels.columns();
  const std::int64_t shape[] = {panels * kPanelRows, columns};
  Tensor out = empty(shape, 2, qquant::code_of(real));
  void* const to = out.mutable_data_ptr();
  if (out.numel() > 0)
    split(panels, 1, kPanelRows * columns, kGrainValues, [&](std::int64_t first, std::int64_t last) {
      qquant::unpack_weights(held.panels, to, real, first, last);
    });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qquant, CPU, m) {
  m.impl("panel_linear", TORCH_BOX(&panel_linear));
  m.impl("panel_weights", TORCH_BOX(&panel_weights));
}
