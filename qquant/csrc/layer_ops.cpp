// A decoder layer, or its two halves around attention, for one new token of a few sequences: binds the kernels of
// cpu/linear.h, cpu/rms_norm.h and cpu/layer_step.h to the operators that layer_ops.py declares. Nothing inside goes
// through torch's dispatcher; what is in between lives in memory of the call.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/layer_step.h"
#include "cpu/rms_norm.h"
#include "panel_tensors.h"
#include "step_ops.h"

namespace {

using qquant::has_shape;
using qquant::kPanelRows;
using qquant::Real;
using qquant::shape_of;
using qquant::Slice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Rows = std::unique_ptr<std::uint16_t[]>;

Rows rows_of(std::int64_t count) { return Rows(new std::uint16_t[std::size_t(count)]); }

void check_bfloat16(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

const std::uint16_t* reals(const Tensor& tensor) { return static_cast<const std::uint16_t*>(tensor.const_data_ptr()); }
std::uint16_t* room(Tensor& tensor) { return static_cast<std::uint16_t*>(tensor.mutable_data_ptr()); }

Tensor empty_bfloat16(std::initializer_list<std::int64_t> shape) {
  return qquant::empty(shape.begin(), std::int64_t(shape.size()), aoti_torch_dtype_bfloat16());
}

// One call of a packed linear, or of several side by side, whose input and results lie in memory that is ours.
class Stage {
 public:
  Stage(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
        const std::optional<Tensor>& order, const std::optional<Tensor>& bias, std::int64_t bits,
        std::int64_t group_size, std::int64_t zero, std::int64_t activation_bits, std::int64_t features)
      : held_(qquant::take_panels(words, scales, zeros, bits, group_size, zero)), features_(features) {
    problem_.weight = held_.panels;
    problem_.dtype = Real::bfloat16;
    const std::int64_t columns = held_.panels.columns();
    if (order.has_value()) {
      order_ = qquant::take_order(*order, columns, features);
      problem_.order = static_cast<const std::int32_t*>(order_->const_data_ptr());
    } else {
      STD_TORCH_CHECK(features == columns, "the input of panels must end in ", columns, " features, got ", features);
    }
    if (bias.has_value()) {
      STD_TORCH_CHECK(has_shape(*bias, {held_.panels.panels * kPanelRows}) && bias->scalar_type() == ScalarType::Float,
                      "bias must be [", held_.panels.panels * kPanelRows, "] float32, got ", shape_of(*bias));
      bias_ = qquant::together(*bias);
      problem_.bias = static_cast<const float*>(bias_->const_data_ptr());
    }
    kernels_ = &qquant::kernels_of(activation_bits, problem_);
  }

  std::int64_t panels() const { return held_.panels.panels; }

  // Rows of `features` side by side to one result per width, each [tokens][width].
  template <std::size_t Count>
  void run(const std::uint16_t* x, std::int64_t tokens,
           const std::pair<std::uint16_t*, std::int64_t> (&results)[Count]) {
    Slice slices[Count];
    std::int64_t panel = 0;
    for (std::size_t i = 0; i < Count; ++i) {
      slices[i] = {results[i].first, panel, results[i].second};
      panel += (results[i].second + kPanelRows - 1) / kPanelRows;
    }
    STD_TORCH_CHECK(panel == panels(), "outputs need ", panel, " panels, got ", panels());
    problem_.x = x;
    problem_.tokens = tokens;
    problem_.stride = features_;
    problem_.slices = slices;
    problem_.slice_count = std::int64_t(Count);
    if (tokens > 0) qquant::compute(problem_, *kernels_);
  }

 private:
  qquant::HeldPanels held_;
  std::optional<Tensor> order_, bias_;
  qquant::Linear problem_{};
  const qquant::LinearKernels* kernels_ = nullptr;
  std::int64_t features_;
};

void normalize(const std::uint16_t* x, const Tensor& weight, double eps, std::int64_t rows, std::int64_t size,
               std::uint16_t* out) {
  check_bfloat16(weight, "a norm's weight");
  STD_TORCH_CHECK(has_shape(weight, {size}) && weight.is_contiguous(), "a norm's weight must be [", size, "], got ",
                  shape_of(weight));
  qquant::normalize({x, reals(weight), out, size, size, float(eps)}, 0, rows);
}

// The rotation of one sequence's heads by RoPE; one table may be all sequences'.
class Turns {
 public:
  Turns(const Tensor& cos, const Tensor& sin, std::int64_t batch, std::int64_t size)
      : wide_(cos.scalar_type() == ScalarType::Float), size_(size), cos_(take(cos, batch, "cos")),
        sin_(take(sin, batch, "sin")) {
    STD_TORCH_CHECK(cos.scalar_type() == sin.scalar_type() && cos.size(cos.dim() - 1) == sin.size(sin.dim() - 1),
                    "cos and sin must be alike, got ", shape_of(cos), " and ", shape_of(sin));
  }

  void rotate(std::uint16_t* states, std::int64_t row, std::int64_t heads) const {
    if (wide_)
      qquant::rotate_wide(states, table<float>(cos_, row), table<float>(sin_, row), heads, size_, cos_.size(3));
    else
      qquant::rotate(states, table<std::uint16_t>(cos_, row), table<std::uint16_t>(sin_, row), heads, size_);
  }

 private:
  // [B or 1, 1, D] bfloat16 or [B or 1, 1, 1, R / 2] float32, the numbers of a sequence side by side.
  Tensor take(const Tensor& turns, std::int64_t batch, const char* name) const {
    const std::int64_t axes = turns.dim();
    const bool of_batch = axes > 0 && (turns.size(0) == 1 || turns.size(0) == batch);
    if (turns.scalar_type() == ScalarType::Float) {
      STD_TORCH_CHECK(of_batch && axes == 4 && turns.size(1) == 1 && turns.size(2) == 1 && 2 * turns.size(3) <= size_,
                      name, " in float32 must be [", batch, " or 1, 1, 1, up to ", size_ / 2, "], got ",
                      shape_of(turns));
    } else {
      check_bfloat16(turns, name);
      STD_TORCH_CHECK(of_batch && axes == 3 && turns.size(1) == 1 && turns.size(2) == size_ && size_ % 2 == 0, name,
                      " must be [", batch, " or 1, 1, ", size_, "] with an even last axis, got ", shape_of(turns));
    }
    return turns.stride(axes - 1) == 1 ? turns : torch::stable::contiguous(turns);
  }

  template <typename T>
  static const T* table(const Tensor& turns, std::int64_t row) {
    return static_cast<const T*>(turns.const_data_ptr()) + (turns.size(0) == 1 ? 0 : row * turns.stride(0));
  }

  bool wide_;
  std::int64_t size_;
  Tensor cos_, sin_;
};

std::tuple<Tensor, Tensor, Tensor> attention_inputs(
    const Tensor& given, const Tensor& norm, double eps, const Tensor& cos, const Tensor& sin,
    const std::optional<Tensor>& query_norm, const std::optional<Tensor>& key_norm, double head_eps,
    const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros, const std::optional<Tensor>& order,
    const std::optional<Tensor>& bias, std::int64_t bits, std::int64_t group_size, std::int64_t zero,
    std::int64_t activation_bits, std::int64_t heads, std::int64_t kv_heads, std::int64_t size) {
  check_bfloat16(given, "x");
  STD_TORCH_CHECK(given.dim() == 3 && given.size(1) == 1, "x must be [B, 1, N], got ", shape_of(given));
  STD_TORCH_CHECK(heads > 0 && kv_heads > 0 && size > 0, "heads and their size must be positive");
  const Tensor x = qquant::together(given);
  const std::int64_t batch = x.size(0), features = x.size(2);
  const Turns turns(cos, sin, batch, size);
  Stage stage(words, scales, zeros, order, bias, bits, group_size, zero, activation_bits, features);
  Rows normed = rows_of(batch * features);
  normalize(reals(x), norm, eps, batch, features, normed.get());
  Tensor query = empty_bfloat16({batch, heads, 1, size}), key = empty_bfloat16({batch, kv_heads, 1, size});
  Tensor value = empty_bfloat16({batch, kv_heads, 1, size});
  stage.run(normed.get(), batch,
            {{room(query), heads * size}, {room(key), kv_heads * size}, {room(value), kv_heads * size}});
  if (query_norm.has_value())
    normalize(room(query), *query_norm, head_eps, batch * heads, size, room(query));
  if (key_norm.has_value()) normalize(room(key), *key_norm, head_eps, batch * kv_heads, size, room(key));
  for (std::int64_t row = 0; row < batch; ++row) {
    turns.rotate(room(query) + row * heads * size, row, heads);
    turns.rotate(room(key) + row * kv_heads * size, row, kv_heads);
  }
  return {query, key, value};
}

Tensor layer_output(const Tensor& given, const Tensor& stream, const Tensor& o_words, const Tensor& o_scales,
                    const std::optional<Tensor>& o_zeros, const std::optional<Tensor>& o_order,
                    const std::optional<Tensor>& o_bias, std::int64_t o_bits, std::int64_t o_group, std::int64_t o_zero,
                    std::int64_t o_activation_bits, const Tensor& norm, double eps, const Tensor& g_words,
                    const Tensor& g_scales, const std::optional<Tensor>& g_zeros, const std::optional<Tensor>& g_order,
                    const std::optional<Tensor>& g_bias, std::int64_t g_bits, std::int64_t g_group, std::int64_t g_zero,
                    std::int64_t g_activation_bits, const Tensor& d_words, const Tensor& d_scales,
                    const std::optional<Tensor>& d_zeros, const std::optional<Tensor>& d_order,
                    const std::optional<Tensor>& d_bias, std::int64_t d_bits, std::int64_t d_group, std::int64_t d_zero,
                    std::int64_t d_activation_bits, std::int64_t width, bool gate_first) {
  check_bfloat16(given, "attended");
  check_bfloat16(stream, "stream");
  STD_TORCH_CHECK(stream.dim() == 3 && stream.size(1) == 1, "stream must be [B, 1, N], got ", shape_of(stream));
  const Tensor attended = qquant::together(given), before = qquant::together(stream);
  const std::int64_t batch = before.size(0), features = before.size(2);
  const std::int64_t inner = batch > 0 ? attended.numel() / batch : 0;
  STD_TORCH_CHECK(width > 0, "width must be positive, got ", width);
  STD_TORCH_CHECK(inner * batch == attended.numel(), "attended must hold ", batch, " rows, got ", shape_of(given));
  Tensor out = empty_bfloat16({batch, 1, features});
  if (batch == 0) return out;
  Stage project(o_words, o_scales, o_zeros, o_order, o_bias, o_bits, o_group, o_zero, o_activation_bits, inner);
  Stage raise(g_words, g_scales, g_zeros, g_order, g_bias, g_bits, g_group, g_zero, g_activation_bits, features);
  Stage lower(d_words, d_scales, d_zeros, d_order, d_bias, d_bits, d_group, d_zero, d_activation_bits, width);
  const std::int64_t count = batch * features;
  const std::int64_t inside = batch * width;
  Rows normed = rows_of(count), first = rows_of(inside), second = rows_of(inside), product = rows_of(inside);
  std::uint16_t* const sum = room(out);
  project.run(reals(attended), batch, {{sum, features}});
  qquant::add_to(sum, reals(before), count);
  normalize(sum, norm, eps, batch, features, normed.get());
  raise.run(normed.get(), batch, {{first.get(), width}, {second.get(), width}});
  const Rows &gate = gate_first ? first : second, &up = gate_first ? second : first;
  qquant::silu_product(gate.get(), up.get(), product.get(), inside);
  lower.run(product.get(), batch, {{normed.get(), features}});
  qquant::add_to(sum, normed.get(), count);
  return out;
}

// The states of one new token to the last place of a cache's: [B, H, 1, D] to [B, H, T, D].
void enter(Tensor& states, const Tensor& cache, const char* name) {
  check_bfloat16(cache, name);
  STD_TORCH_CHECK(cache.dim() == 4 && cache.size(0) == states.size(0) && cache.size(1) == states.size(1) &&
                      cache.size(2) > 0 && cache.size(3) == states.size(3) && cache.stride(3) == 1,
                  name, " must be [", states.size(0), ", ", states.size(1), ", T, ", states.size(3),
                  "] with room for the new token, got ", shape_of(cache));
  const std::int64_t heads = states.size(1), size = states.size(3), last = (cache.size(2) - 1) * cache.stride(2);
  auto* const to = static_cast<std::uint16_t*>(cache.mutable_data_ptr()) + last;
  for (std::int64_t row = 0; row < states.size(0) * heads; ++row)
    std::copy_n(room(states) + row * size, size, to + row / heads * cache.stride(0) + row % heads * cache.stride(1));
}

Tensor layer_step(const Tensor& x, const Tensor& norm, double eps, const Tensor& cos, const Tensor& sin,
                  const std::optional<Tensor>& query_norm, const std::optional<Tensor>& key_norm, double head_eps,
                  const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
                  const std::optional<Tensor>& order, const std::optional<Tensor>& bias, std::int64_t bits,
                  std::int64_t group_size, std::int64_t zero, std::int64_t activation_bits, std::int64_t heads,
                  std::int64_t kv_heads, std::int64_t size, const Tensor& keys, const Tensor& values,
                  const std::optional<Tensor>& mask, double scaling, const Tensor& o_words, const Tensor& o_scales,
                  const std::optional<Tensor>& o_zeros, const std::optional<Tensor>& o_order,
                  const std::optional<Tensor>& o_bias, std::int64_t o_bits, std::int64_t o_group, std::int64_t o_zero,
                  std::int64_t o_activation_bits, const Tensor& next_norm, double next_eps, const Tensor& g_words,
                  const Tensor& g_scales, const std::optional<Tensor>& g_zeros, const std::optional<Tensor>& g_order,
                  const std::optional<Tensor>& g_bias, std::int64_t g_bits, std::int64_t g_group, std::int64_t g_zero,
                  std::int64_t g_activation_bits, const Tensor& d_words, const Tensor& d_scales,
                  const std::optional<Tensor>& d_zeros, const std::optional<Tensor>& d_order,
                  const std::optional<Tensor>& d_bias, std::int64_t d_bits, std::int64_t d_group, std::int64_t d_zero,
                  std::int64_t d_activation_bits, std::int64_t width, bool gate_first) {
  auto [query, key, value] =
      attention_inputs(x, norm, eps, cos, sin, query_norm, key_norm, head_eps, words, scales, zeros, order, bias, bits,
                       group_size, zero, activation_bits, heads, kv_heads, size);
  enter(key, keys, "keys");
  enter(value, values, "values");
  return layer_output(qquant::decode_attention(query, keys, values, mask, scaling), x, o_words, o_scales, o_zeros,
                      o_order, o_bias, o_bits, o_group, o_zero, o_activation_bits, next_norm, next_eps, g_words,
                      g_scales, g_zeros, g_order, g_bias, g_bits, g_group, g_zero, g_activation_bits, d_words, d_scales,
                      d_zeros, d_order, d_bias, d_bits, d_group, d_zero, d_activation_bits, width, gate_first);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qquant, CPU, m) {
  m.impl("attention_inputs", TORCH_BOX(&attention_inputs));
  m.impl("layer_output", TORCH_BOX(&layer_output));
  m.impl("layer_step", TORCH_BOX(&layer_step));
}
