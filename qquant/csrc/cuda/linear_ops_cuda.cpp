// Binds the CUDA kernels of packed linears to the operators that linear_ops.py declares, by libtorch's stable ABI.
// Checks of what a kernel cannot take live here, and everything that needs torch: device, stream, memory.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "linear_launch.h"
#include "ops_cuda.h"

namespace {

using namespace qquant;

constexpr std::int64_t kMaxFeatures = std::int64_t{1} << 23;

bool has_shape(const Tensor& tensor, std::initializer_list<std::int64_t> shape) {
  if (tensor.dim() != std::int64_t(shape.size())) return false;
  std::int64_t axis = 0;
  for (const std::int64_t size : shape)
    if (tensor.size(axis++) != size) return false;
  return true;
}

// A tensor as kernels read it, contiguous and from a multiple of 16 bytes on; a copy where it is not so.
Tensor together(const Tensor& tensor) {
  const Tensor held = torch::stable::contiguous(tensor);
  return reinterpret_cast<std::uintptr_t>(held.const_data_ptr()) % 16 == 0 ? held : torch::stable::clone(held);
}

// The tensors of some panels, held for as long as `panels` points into them.
struct HeldPanels {
  Tensor words, scales;
  std::optional<Tensor> zeros;
  QqPanels panels;

  std::int64_t columns() const { return panels.steps * (32 / panels.bits); }
};

void check_words(const Tensor& words, std::int64_t bits, std::int64_t group_size, std::int64_t zero) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  STD_TORCH_CHECK(
      words.dim() == 3 && words.size(2) == kQqPanelRows && words.scalar_type() == ScalarType::Int && words.is_cuda(),
      "words must be [P, S, ", kQqPanelRows, "] int32 on a GPU, got ", shape_of(words), " ",
      torch::headeronly::toString(words.scalar_type()));
  const std::int64_t per = 32 / bits;
  STD_TORCH_CHECK(group_size > 0 && group_size % per == 0, "group_size must be a multiple of ", per, " for ", bits,
                  " bits, got ", group_size);
  STD_TORCH_CHECK(words.size(1) > 0 && words.size(1) * per <= kMaxFeatures, "words must hold 1 to ", kMaxFeatures,
                  " columns on a GPU, got ", words.size(1) * per);
  STD_TORCH_CHECK(0 <= zero && zero <= std::int64_t{1} << bits, "zero must be 0 to 2^bits, got ", zero, " for ", bits,
                  " bits");
}

HeldPanels take_panels(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros, std::int64_t bits,
                       std::int64_t group_size, std::int64_t zero) {
  check_words(words, bits, group_size, zero);
  const std::int64_t panels = words.size(0), columns = words.size(1) * (32 / bits);
  const std::int64_t groups = (columns + group_size - 1) / group_size;
  const ScalarType dtype = scales.scalar_type();
  STD_TORCH_CHECK(
      has_shape(scales, {panels, groups, kQqPanelRows}) && (dtype == ScalarType::Half || dtype == ScalarType::Float),
      "scales must be [", panels, ", ", groups, ", ", kQqPanelRows, "] float16 or float32, got ", shape_of(scales), " ",
      torch::headeronly::toString(dtype));
  check_device(scales, words, "scales");
  STD_TORCH_CHECK(panels * groups * kQqPanelRows < kInt32 && panels < kInt32 / kQqPanelRows,
                  "panels must have fewer than 2^31 rows, and as many scales, got ", shape_of(scales));
  HeldPanels held{together(words), together(scales), std::nullopt, QqPanels{}};
  if (zeros.has_value()) {
    STD_TORCH_CHECK(has_shape(*zeros, {panels, groups, kQqPanelRows}) && zeros->scalar_type() == ScalarType::Byte,
                    "zeros must be [", panels, ", ", groups, ", ", kQqPanelRows, "] uint8, got ", shape_of(*zeros), " ",
                    torch::headeronly::toString(zeros->scalar_type()));
    check_device(*zeros, words, "zeros");
    held.zeros = together(*zeros);
    held.panels.zeros = static_cast<const std::uint8_t*>(held.zeros->const_data_ptr());
  }
  held.panels.words = static_cast<const std::uint32_t*>(held.words.const_data_ptr());
  held.panels.scales = held.scales.const_data_ptr();
  held.panels.panels = panels;
  held.panels.steps = words.size(1);
  held.panels.groups = groups;
  held.panels.group = group_size;
  held.panels.zero = std::int32_t(zero);
  held.panels.bits = std::int32_t(bits);
  held.panels.half_scales = dtype == ScalarType::Half;
  return held;
}

// x as rows at an even distance, each side by side; a copy where it is not so.
Tensor take_rows(const Tensor& x, QqLinear& args) {
  const std::int64_t last = x.dim() - 1, features = x.size(last);
  bool rows = features <= 1 || x.stride(last) == 1;
  std::int64_t tokens = 1, stride = features;
  for (std::int64_t axis = last - 1; axis >= 0; --axis) {
    if (x.size(axis) == 1) continue;
    if (tokens == 1) stride = x.stride(axis);
    rows = rows && x.stride(axis) == stride * tokens;
    tokens *= x.size(axis);
  }
  const Tensor held = rows ? x : torch::stable::contiguous(x);
  args.x = held.const_data_ptr();
  args.tokens = tokens;
  args.stride = rows ? stride : features;
  args.features = features;
  return held;
}

// The tensors of one call beside its panels, held likewise.
struct HeldInput {
  Tensor rows;
  std::optional<Tensor> order, bias;
};

HeldInput take_input(const Tensor& x, const std::optional<Tensor>& order, const std::optional<Tensor>& bias,
                     const HeldPanels& held, QqLinear& args) {
  const std::int64_t columns = held.columns(), rows = held.panels.panels * kQqPanelRows;
  args.dtype = dtype_of(x.scalar_type(), "x");
  check_device(x, held.words, "x");
  STD_TORCH_CHECK(x.dim() > 0, "x must have an axis of features");
  const std::int64_t features = x.size(x.dim() - 1);
  HeldInput input{take_rows(x, args), std::nullopt, std::nullopt};
  if (order.has_value()) {
    STD_TORCH_CHECK(has_shape(*order, {columns}) && order->scalar_type() == ScalarType::Int, "order must be [", columns,
                    "] int32, got ", shape_of(*order), " ", torch::headeronly::toString(order->scalar_type()));
    check_device(*order, held.words, "order");
    input.order = together(*order);
    args.order = static_cast<const std::int32_t*>(input.order->const_data_ptr());
  } else {
    STD_TORCH_CHECK(features == columns, "x must end in ", columns, " features, got ", features);
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(has_shape(*bias, {rows}) && bias->scalar_type() == ScalarType::Float, "bias must be [", rows,
                    "] float32, got ", shape_of(*bias), " ", torch::headeronly::toString(bias->scalar_type()));
    check_device(*bias, held.words, "bias");
    input.bias = together(*bias);
    args.bias = static_cast<const float*>(input.bias->const_data_ptr());
  }
  return input;
}

// Panels of the outputs together.
std::int64_t panels_of(const std::vector<std::int64_t>& widths) {
  std::int64_t panels = 0;
  for (const std::int64_t width : widths) {
    STD_TORCH_CHECK(width > 0, "outputs must have at least one feature each, got ", width);
    panels += (width + kQqPanelRows - 1) / kQqPanelRows;
  }
  return panels;
}

// Launches what args describes but for its workspace.
void compute(QqLinear& args, const Tensor& x, const Launch& launch) {
  args.splits = qq_panel_linear_splits(&args, launch.multiprocessors());
  const std::int64_t bytes[] = {qq_panel_linear_workspace(&args)};
  std::optional<Tensor> workspace;
  args.workspace = nullptr;
  if (bytes[0] > 0) {
    workspace = torch::stable::new_empty(x, {bytes, 1}, ScalarType::Byte);
    args.workspace = static_cast<unsigned char*>(workspace->mutable_data_ptr());
  }
  check_cuda(qq_panel_linear(&args, launch.stream()), "panel_linear");
}

// Outputs [first, first + slice_count) of all, whose panels begin at `panel`, as a call of its own.
QqLinear part_of(const QqLinear& all, const std::vector<Tensor>& results, const std::vector<std::int64_t>& widths,
                 std::size_t first, std::int64_t panel) {
  QqLinear part = all;
  const std::int64_t numbers = panel * all.weight.groups * kQqPanelRows;
  part.weight.words += panel * all.weight.steps * kQqPanelRows;
  part.weight.scales = static_cast<const char*>(all.weight.scales) + numbers * (all.weight.half_scales ? 2 : 4);
  if (all.weight.zeros != nullptr) part.weight.zeros += numbers;
  if (all.bias != nullptr) part.bias += panel * kQqPanelRows;
  part.weight.panels = 0;
  const std::size_t last = std::min(widths.size(), first + kQqMaxSlices);
  for (std::size_t i = first; i < last; ++i) {
    part.slices[part.slice_count++] = {results[i].mutable_data_ptr(), part.weight.panels, widths[i]};
    part.weight.panels += (widths[i] + kQqPanelRows - 1) / kQqPanelRows;
  }
  return part;
}

std::vector<Tensor> panel_linear(const Tensor& x, const Tensor& words, const Tensor& scales,
                                 const std::optional<Tensor>& zeros, const std::optional<Tensor>& order,
                                 const std::optional<Tensor>& bias, std::vector<std::int64_t> widths, std::int64_t bits,
                                 std::int64_t group_size, std::int64_t zero, std::int64_t activation_bits) {
  STD_TORCH_CHECK(activation_bits == 0, "activation_bits must be 0 on a GPU, got ", activation_bits,
                  "; its kernel uses activations as they are");
  const HeldPanels held = take_panels(words, scales, zeros, bits, group_size, zero);
  const std::int64_t wanted = panels_of(widths);
  STD_TORCH_CHECK(wanted == held.panels.panels && wanted > 0, "outputs need ", wanted, " panels, got ",
                  held.panels.panels);
  QqLinear args = {};
  args.weight = held.panels;
  const HeldInput input = take_input(x, order, bias, held, args);
  STD_TORCH_CHECK(args.tokens <= kQqMaxTokens, "x must have at most ", kQqMaxTokens, " tokens on a GPU, got ",
                  args.tokens, "; multiply by panel_weights instead");
  const auto sizes = x.sizes();
  std::vector<std::int64_t> shape(sizes.begin(), sizes.end());
  std::vector<Tensor> results;
  results.reserve(widths.size());
  for (const std::int64_t width : widths) {
    shape.back() = width;
    results.push_back(torch::stable::new_empty(x, {shape.data(), shape.size()}));
  }
  if (args.tokens == 0) return results;
  const Launch launch(x);
  std::int64_t panel = 0;
  for (std::size_t first = 0; first < widths.size(); first += kQqMaxSlices) {
    QqLinear part = part_of(args, results, widths, first, panel);
    panel += part.weight.panels;
    compute(part, x, launch);
  }
  return results;
}

Tensor panel_weights(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros, std::int64_t bits,
                     std::int64_t group_size, std::int64_t zero, ScalarType dtype) {
  const HeldPanels held = take_panels(words, scales, zeros, bits, group_size, zero);
  STD_TORCH_CHECK(held.panels.panels <= kMaxGrid, "words must have at most ", kMaxGrid, " panels, got ",
                  held.panels.panels, "; take them in parts");
  QqWeights args = {held.panels, nullptr, dtype_of(dtype, "dtype")};
  const std::int64_t shape[] = {held.panels.panels * kQqPanelRows, held.columns()};
  Tensor out = torch::stable::new_empty(words, {shape, 2}, dtype);
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  const Launch launch(words);
  check_cuda(qq_panel_weights(&args, launch.stream()), "panel_weights");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qquant, CUDA, m) {
  m.impl("panel_linear", TORCH_BOX(&panel_linear));
  m.impl("panel_weights", TORCH_BOX(&panel_weights));
}
