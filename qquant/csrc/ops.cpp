// Binds the attention kernels of cpu/ to the operators that kv_ops.py declares, by libtorch's stable ABI: one binary
// runs under torch 2.11 and every later one. Checks of what a kernel cannot take live here; kernels themselves know
// nothing of torch. The operators of linear_ops.py are bound in linear_ops.cpp.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "cpu/isa.h"
#include "cpu/kv_attention.h"
#include "cpu/kv_codes.h"
#include "tensor_checks.h"

namespace {

using qquant::Real;
using qquant::real_of;
using qquant::shape_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::int64_t kGrainBytes = std::int64_t{1} << 17;  // of codes per thread: less is not worth waking one

void check_last_stride(const Tensor& tensor, const char* name) {
  const std::int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
                  " must have its last axis side by side in memory, got a stride of ", tensor.stride(last),
                  "; call contiguous() on it");
}

void check_codes(const Tensor& codes, const char* name) {
  STD_TORCH_CHECK(codes.dim() == 4, name, " must have 4 axes, [B, H, T, D], got ", shape_of(codes));
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, name, " must be uint8, got ",
                  torch::headeronly::toString(codes.scalar_type()));
  check_last_stride(codes, name);
}

// Scale or zero of `codes`.
void check_numbers(const Tensor& numbers, const Tensor& codes, const char* name) {
  STD_TORCH_CHECK(numbers.dim() == 3 && numbers.size(0) == codes.size(0) && numbers.size(1) == codes.size(1) &&
                      numbers.size(2) == codes.size(2),
                  name, " must have the first three sizes of its codes, ", shape_of(codes), ", got ",
                  shape_of(numbers));
  STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Half, name, " must be float16, got ",
                  torch::headeronly::toString(numbers.scalar_type()));
  check_last_stride(numbers, name);
}

const std::uint16_t* halves(const Tensor& tensor) { return static_cast<const std::uint16_t*>(tensor.const_data_ptr()); }
std::uint16_t* mutable_halves(const Tensor& tensor) { return static_cast<std::uint16_t*>(tensor.mutable_data_ptr()); }

// Calls run(batch, head, first token, count) for stretches of tokens that together are all of [batch, heads, tokens].
template <class Run>
void for_each_stretch(std::int64_t batch, std::int64_t heads, std::int64_t tokens, std::int64_t size, const Run& run) {
  if (batch * heads * tokens * size == 0) return;
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainBytes / size);
  torch::stable::parallel_for(0, batch * heads * tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t vector = begin / tokens, token = begin % tokens;
      const std::int64_t count = std::min(tokens - token, end - begin);
      run(vector / heads, vector % heads, token, count);
      begin += count;
    }
  });
}

void kv_append(const Tensor& codes, const Tensor& scale, const Tensor& zero, const Tensor& states, std::int64_t at) {
  check_codes(codes, "codes");
  check_numbers(scale, codes, "scale");
  check_numbers(zero, codes, "zero");
  STD_TORCH_CHECK(states.dim() == 4 && states.size(0) == codes.size(0) && states.size(1) == codes.size(1) &&
                      states.size(3) == codes.size(3),
                  "states must be [B, H, L, D] with the B, H and D of the cache, ", shape_of(codes), ", got ",
                  shape_of(states));
  const Real dtype = real_of(states.scalar_type(), "states");
  check_last_stride(states, "states");
  const std::int64_t size = codes.size(3), tokens = states.size(2), room = codes.size(2);
  STD_TORCH_CHECK(0 <= at && tokens <= room && at <= room - tokens, "tokens ", at, " to ", at + tokens,
                  " must fit into the cache's room of ", room);
  auto* const to = static_cast<std::uint8_t*>(codes.mutable_data_ptr());
  std::uint16_t *const to_scale = mutable_halves(scale), *const to_zero = mutable_halves(zero);
  const auto* const from = static_cast<const char*>(states.const_data_ptr());
  const qquant::CodeKernels& kernels = qquant::code_kernels();
  const auto from_at = states.strides(), to_at = codes.strides(), scale_at = scale.strides(), zero_at = zero.strides();
  for_each_stretch(
      states.size(0), states.size(1), tokens, size,
      [&](std::int64_t b, std::int64_t h, std::int64_t token, std::int64_t count) {
        const std::int64_t place = at + token;
        kernels.encode({from + (b * from_at[0] + h * from_at[1] + token * from_at[2]) * bytes_of(dtype), dtype,
                        from_at[2], count, size, to + b * to_at[0] + h * to_at[1] + place * to_at[2], to_at[2],
                        to_scale + b * scale_at[0] + h * scale_at[1] + place,
                        to_zero + b * zero_at[0] + h * zero_at[1] + place});
      });
}

Tensor kv_dequantize(const Tensor& codes, const Tensor& scale, const Tensor& zero, ScalarType dtype) {
  check_codes(codes, "codes");
  check_numbers(scale, codes, "scale");
  check_numbers(zero, codes, "zero");
  const Real real = real_of(dtype, "dtype");
  Tensor out = torch::stable::new_empty(codes, codes.sizes(), dtype);
  const std::int64_t heads = codes.size(1), tokens = codes.size(2), size = codes.size(3);
  const auto* const from = static_cast<const std::uint8_t*>(codes.const_data_ptr());
  const std::uint16_t *const from_scale = halves(scale), *const from_zero = halves(zero);
  auto* const to = static_cast<char*>(out.mutable_data_ptr());
  const qquant::CodeKernels& kernels = qquant::code_kernels();
  const auto from_at = codes.strides(), scale_at = scale.strides(), zero_at = zero.strides();
  for_each_stretch(codes.size(0), heads, tokens, size,
                   [&](std::int64_t b, std::int64_t h, std::int64_t token, std::int64_t count) {
                     kernels.decode({from + b * from_at[0] + h * from_at[1] + token * from_at[2], from_at[2], count,
                                     size, from_scale + b * scale_at[0] + h * scale_at[1] + token,
                                     from_zero + b * zero_at[0] + h * zero_at[1] + token,
                                     to + ((b * heads + h) * tokens + token) * size * bytes_of(real), real});
                   });
  return out;
}

qquant::Codes codes_of(const Tensor& codes) {
  return {static_cast<const std::uint8_t*>(codes.const_data_ptr()), codes.stride(0), codes.stride(1), codes.stride(2),
          codes.size(3)};
}

qquant::Numbers numbers_of(const Tensor& numbers) { return {halves(numbers), numbers.stride(0), numbers.stride(1)}; }

// Checks a mask and enters it into the problem. Returns what must stay alive until the problem is solved.
std::optional<Tensor> take_mask(const std::optional<Tensor>& given, qquant::Attention& problem) {
  problem.mask = nullptr;
  if (!given.has_value()) return std::nullopt;
  const std::int64_t heads = problem.kv_heads * problem.group;
  Tensor mask = *given;
  STD_TORCH_CHECK(mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == problem.batch) &&
                      (mask.size(1) == 1 || mask.size(1) == heads) && mask.size(2) == problem.length &&
                      mask.size(3) == problem.tokens,
                  "mask must be [", problem.batch, " or 1, ", heads, " or 1, ", problem.length, ", ", problem.tokens,
                  "], got ", shape_of(mask));
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool, true where a key is seen, got ",
                  torch::headeronly::toString(mask.scalar_type()));
  if (mask.size(3) > 1 && mask.stride(3) != 1) mask = torch::stable::contiguous(mask);
  problem.mask = static_cast<const std::uint8_t*>(mask.const_data_ptr());
  problem.mask_batch = mask.size(0) == 1 ? 0 : mask.stride(0);
  problem.mask_head = mask.size(1) == 1 ? 0 : mask.stride(1);
  problem.mask_row = mask.stride(2);
  return mask;
}

void check_attention(const Tensor& query, const Tensor& k_codes, const Tensor& v_codes) {
  check_codes(k_codes, "k_codes");
  check_codes(v_codes, "v_codes");
  STD_TORCH_CHECK(query.dim() == 4 && query.size(0) == k_codes.size(0) && query.size(3) == k_codes.size(3) &&
                      v_codes.size(0) == k_codes.size(0) && v_codes.size(1) == k_codes.size(1) &&
                      v_codes.size(2) == k_codes.size(2),
                  "the cache ", shape_of(k_codes), ", ", shape_of(v_codes), " does not fit the query ", shape_of(query),
                  "; all must agree in B, both caches in H and T, query and keys in D");
  STD_TORCH_CHECK(k_codes.size(1) > 0 && query.size(1) % k_codes.size(1) == 0, query.size(1),
                  " query heads cannot share ", k_codes.size(1), " KV heads evenly");
  STD_TORCH_CHECK(query.size(2) <= k_codes.size(2), query.size(2), " queries need at least as many keys, got ",
                  k_codes.size(2));
  check_last_stride(query, "query");
}

Tensor kv_decode_attention(const Tensor& query, const Tensor& k_codes, const Tensor& k_scale, const Tensor& k_zero,
                           const Tensor& v_codes, const Tensor& v_scale, const Tensor& v_zero,
                           const std::optional<Tensor>& mask, double scaling) {
  check_attention(query, k_codes, v_codes);
  check_numbers(k_scale, k_codes, "k_scale");
  check_numbers(k_zero, k_codes, "k_zero");
  check_numbers(v_scale, v_codes, "v_scale");
  check_numbers(v_zero, v_codes, "v_zero");

  const std::int64_t shape[] = {query.size(0), query.size(1), query.size(2), v_codes.size(3)};
  Tensor out = torch::stable::new_empty(query, {shape, 4});
  qquant::Attention problem{};
  problem.batch = query.size(0);
  problem.kv_heads = k_codes.size(1);
  problem.group = query.size(1) / problem.kv_heads;
  problem.length = query.size(2);
  problem.tokens = k_codes.size(2);
  problem.query = query.const_data_ptr();
  problem.query_batch = query.stride(0);
  problem.query_head = query.stride(1);
  problem.query_row = query.stride(2);
  problem.out = out.mutable_data_ptr();
  problem.dtype = real_of(query.scalar_type(), "query");
  problem.keys = codes_of(k_codes);
  problem.values = codes_of(v_codes);
  problem.k_scale = numbers_of(k_scale);
  problem.k_zero = numbers_of(k_zero);
  problem.v_scale = numbers_of(v_scale);
  problem.v_zero = numbers_of(v_zero);
  problem.scaling = float(scaling);
  const std::optional<Tensor> kept = take_mask(mask, problem);
  if (out.numel() == 0) return out;

  const qquant::AttentionKernels& kernels = qquant::attention_kernels();
  const std::int64_t tasks = problem.tasks();
  std::optional<Tensor> partial;
  float* kept_parts = nullptr;
  if (problem.splits() > 1) {
    const std::int64_t parts[] = {tasks, problem.tile_rows(), problem.partial_row()};
    partial = torch::stable::new_empty(query, {parts, 3}, ScalarType::Float);
    kept_parts = static_cast<float*>(partial->mutable_data_ptr());
  }
  const std::int64_t bytes = problem.tokens / problem.splits() * (problem.keys.size + problem.values.size);
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainBytes / std::max<std::int64_t>(1, bytes));
  torch::stable::parallel_for(0, tasks, grain, [&](std::int64_t begin, std::int64_t end) {
    qquant::attend(problem, kernels, begin, end, kept_parts);
  });
  if (problem.splits() > 1) qquant::merge_splits(problem, kernels, kept_parts);
  return out;
}

// The best instruction set that the kernels may use on this processor; one that has no code for it uses less.
std::string cpu_kernel_info() {
  const std::string name = qquant::name_of(qquant::isa());
  std::string text;
  for (const char* op : {"kv_append", "kv_dequantize", "kv_decode_attention", "panel_linear", "panel_weights",
                         "dense_linear", "rms_norm", "decode_attention", "layer_step"})
    text += (text.empty() ? "" : ", ") + std::string(op) + ": " + name;
  return text;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qquant, m) { m.def("cpu_kernel_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(qquant, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernel_info", TORCH_BOX(&cpu_kernel_info));
}

STABLE_TORCH_LIBRARY_IMPL(qquant, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&kv_append));
  m.impl("kv_dequantize", TORCH_BOX(&kv_dequantize));
  m.impl("kv_decode_attention", TORCH_BOX(&kv_decode_attention));
}

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels; importing it registers them.", -1, nullptr};
  return PyModule_Create(&module);
}
