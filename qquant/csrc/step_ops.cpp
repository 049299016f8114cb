// Binds the kernels of cpu/rms_norm.h and cpu/plain_attention.h, what one step of a generation does beside its linears,
// to the operators that rms_norm.py and plain_attention.py declare. Checks of what a kernel cannot take live here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "cpu/plain_attention.h"
#include "cpu/rms_norm.h"
#include "step_ops.h"
#include "tensor_checks.h"

namespace {

using qquant::has_shape;
using qquant::shape_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Less than this is not worth waking a thread for: elements of a norm, bytes of keys and values.
constexpr std::int64_t kGrainElements = std::int64_t{1} << 15, kGrainBytes = std::int64_t{1} << 17;

void check_bfloat16(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16, got ",
                  torch::headeronly::toString(tensor.scalar_type()), "; convert it first");
}

const std::uint16_t* reals(const Tensor& tensor) { return static_cast<const std::uint16_t*>(tensor.const_data_ptr()); }

Tensor rms_norm(const Tensor& given, const Tensor& weight, double eps) {
  check_bfloat16(given, "x");
  check_bfloat16(weight, "weight");
  const std::int64_t size = weight.dim() == 1 ? weight.size(0) : 0;
  STD_TORCH_CHECK(size > 0 && weight.stride(0) == 1 && given.dim() > 0 && given.size(given.dim() - 1) == size,
                  "weight must be as long as a row of x, got ", shape_of(weight), " for ", shape_of(given));
  const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const qquant::RmsNorm norm{reals(x), reals(weight), static_cast<std::uint16_t*>(out.mutable_data_ptr()),
                             size,     size,          float(eps)};
  const std::int64_t rows = x.numel() / size;
  if (rows == 0) return out;
  if (rows * size <= kGrainElements) {
    qquant::normalize(norm, 0, rows);
    return out;
  }
  torch::stable::parallel_for(0, rows, std::max<std::int64_t>(1, kGrainElements / size),
                              [&](std::int64_t begin, std::int64_t end) { qquant::normalize(norm, begin, end); });
  return out;
}

qquant::PlainStates states_of(const Tensor& states, const char* name) {
  check_bfloat16(states, name);
  STD_TORCH_CHECK(states.dim() == 4, name, " must have 4 axes, [B, H, T, D], got ", shape_of(states));
  STD_TORCH_CHECK(states.size(3) <= 1 || states.stride(3) == 1, name,
                  " must have its last axis side by side in memory, got a stride of ", states.stride(3),
                  "; call contiguous() on it");
  return {reals(states), states.stride(0), states.stride(1), states.stride(2), states.size(3)};
}

// Enters a mask into the problem. Returns what must stay alive until the problem is solved.
std::optional<Tensor> take_mask(const std::optional<Tensor>& given, qquant::PlainAttention& problem) {
  if (!given.has_value()) return std::nullopt;
  const std::int64_t heads = problem.kv_heads * problem.group;
  Tensor mask = *given;
  STD_TORCH_CHECK(
      mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == problem.batch) &&
          (mask.size(1) == 1 || mask.size(1) == heads) && mask.size(2) == 1 && mask.size(3) == problem.tokens,
      "mask must be [", problem.batch, " or 1, ", heads, " or 1, 1, ", problem.tokens, "], got ", shape_of(mask));
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool, true where a key is seen, got ",
                  torch::headeronly::toString(mask.scalar_type()));
  if (mask.size(3) > 1 && mask.stride(3) != 1) mask = torch::stable::contiguous(mask);
  problem.mask = static_cast<const std::uint8_t*>(mask.const_data_ptr());
  problem.mask_batch = mask.size(0) == 1 ? 0 : mask.stride(0);
  problem.mask_head = mask.size(1) == 1 ? 0 : mask.stride(1);
  return mask;
}

}  // namespace

Tensor qquant::decode_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                        double scaling) {
  qquant::PlainAttention problem{};
  const qquant::PlainStates asked = states_of(query, "query");
  problem.keys = states_of(key, "key");
  problem.values = states_of(value, "value");
  STD_TORCH_CHECK(query.size(2) == 1, "query must be of one token, got ", shape_of(query));
  STD_TORCH_CHECK(has_shape(key, {query.size(0), key.size(1), key.size(2), query.size(3)}) &&
                      has_shape(value, {key.size(0), key.size(1), key.size(2), value.size(3)}),
                  "key ", shape_of(key), " and value ", shape_of(value), " do not fit the query ", shape_of(query),
                  "; all must agree in B, key and value in H and T, query and key in D");
  STD_TORCH_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0, query.size(1), " query heads cannot share ",
                  key.size(1), " KV heads evenly");
  STD_TORCH_CHECK(qquant::plain_attention_is_here(), "decode_attention has no kernel for this processor");
  problem.batch = query.size(0);
  problem.kv_heads = key.size(1);
  problem.group = query.size(1) / problem.kv_heads;
  problem.tokens = key.size(2);
  problem.query = asked.data;
  problem.query_batch = asked.batch;
  problem.query_head = asked.head;
  problem.scaling = float(scaling);
  const std::int64_t shape[] = {problem.batch, query.size(1), 1, problem.values.size};
  Tensor out = torch::stable::new_empty(query, {shape, 4});
  if (out.numel() == 0) return out;
  problem.out = static_cast<std::uint16_t*>(out.mutable_data_ptr());
  const std::optional<Tensor> kept = take_mask(mask, problem);
  const std::int64_t bytes = 2 * problem.tokens * (problem.keys.size + problem.values.size);
  if (problem.tasks() * bytes <= kGrainBytes) {
    qquant::attend_plain(problem, 0, problem.tasks());
    return out;
  }
  torch::stable::parallel_for(0, problem.tasks(),
                              std::max<std::int64_t>(1, kGrainBytes / std::max<std::int64_t>(1, bytes)),
                              [&](std::int64_t begin, std::int64_t end) { qquant::attend_plain(problem, begin, end); });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qquant, m) { m.def("decode_attention_is_here() -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(qquant, CompositeExplicitAutograd, m) {
  m.impl("decode_attention_is_here", TORCH_BOX(&qquant::plain_attention_is_here));
}

STABLE_TORCH_LIBRARY_IMPL(qquant, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("decode_attention", TORCH_BOX(&qquant::decode_attention));
}
