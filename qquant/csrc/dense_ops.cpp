// Binds the kernels of cpu/dense.h to the operator that dense_linear.py declares. Checks of what a kernel cannot take
// and the split over torch's threads live here; the kernels know nothing of torch.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dense.h"
#include "tensor_checks.h"

namespace {

using qquant::Dense;
using qquant::has_shape;
using qquant::kDenseLine;
using qquant::kDenseTokens;
using qquant::Real;
using qquant::shape_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::int64_t kGrainBytes = std::int64_t{1} << 17;  // of weights per thread: less is not worth waking one

void check_dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [N, K], got ", shape_of(weight));
  const std::int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == columns, "x must end in ", columns, " features, got ",
                  shape_of(x));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16,
                  "x and weight must be bfloat16 on a CPU, got ", torch::headeronly::toString(x.scalar_type()), " and ",
                  torch::headeronly::toString(weight.scalar_type()), "; use F.linear for others");
  STD_TORCH_CHECK(columns <= 1 || weight.stride(1) == 1, "weight must have its rows side by side in memory, got a ",
                  "stride of ", weight.stride(1), " between their numbers; call contiguous() on it");
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(
      has_shape(*bias, {rows}) &&
          (bias->scalar_type() == ScalarType::BFloat16 || bias->scalar_type() == ScalarType::Float),
      "bias must be [", rows, "] bfloat16 or float32, got ", shape_of(*bias), " ",
      torch::headeronly::toString(bias->scalar_type()));
}

Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_dense(x, weight, bias);
  const std::int64_t rows = weight.size(0), columns = weight.size(1);
  const auto sizes = x.sizes();
  std::vector<std::int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = rows;
  Tensor out = torch::stable::new_empty(x, {shape.data(), shape.size()});
  if (out.numel() == 0) return out;

  const std::int64_t tokens = out.numel() / rows;
  const Tensor held = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const auto* const from = static_cast<const std::uint16_t*>(held.const_data_ptr());
  auto* const to = static_cast<std::uint16_t*>(out.mutable_data_ptr());
  std::optional<Tensor> held_bias;
  if (bias.has_value()) held_bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);

  Dense problem{};
  problem.weight = static_cast<const std::uint16_t*>(weight.const_data_ptr());
  problem.rows = rows;
  problem.columns = columns;
  problem.weight_stride = weight.stride(0);
  problem.bias = held_bias ? held_bias->const_data_ptr() : nullptr;
  problem.bias_dtype = held_bias && held_bias->scalar_type() == ScalarType::Float ? Real::float32 : Real::bfloat16;
  const qquant::DenseKernel kernel = qquant::dense_kernel();
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainBytes / std::max<std::int64_t>(1, columns * 2));
  std::vector<std::uint16_t> lines;
  for (std::int64_t first = 0; first < tokens; first += kDenseTokens) {
    problem.tokens = std::min(kDenseTokens, tokens - first);
    problem.x = from + first * columns;  // one token's lines lie side by side already
    problem.out = to + first * rows;
    if (problem.tokens > 1) {
      lines.resize(std::size_t((columns + kDenseLine - 1) / kDenseLine * kDenseLine * problem.tokens));
      qquant::pack_lines(from + first * columns, problem.tokens, columns, columns, lines.data());
      problem.x = lines.data();
    }
    if (rows <= grain)
      kernel(problem, 0, rows);
    else
      torch::stable::parallel_for(0, rows, grain,
                                  [&](std::int64_t begin, std::int64_t end) { kernel(problem, begin, end); });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qquant, CPU, m) { m.impl("dense_linear", TORCH_BOX(&dense_linear)); }
