// Binds the CUDA kernels of the KV cache to the operators that kv_ops.py declares, by libtorch's stable ABI, and is the
// module's way in. Checks of what a kernel cannot take live here; linear_ops_cuda.cpp binds the packed linears.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "kv_launch.h"
#include "ops_cuda.h"

namespace {

using namespace qquant;

constexpr std::int64_t kMaxHeadDim = 256;
constexpr const char* kReference = "; QQUANT_NATIVE=0 in the environment runs the reference instead";

void check_last_stride(const Tensor& tensor, const char* name) {
  const std::int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
                  " must have its last axis side by side in memory, got a stride of ", tensor.stride(last),
                  "; call contiguous() on it");
}

void check_grid(std::int64_t batch, std::int64_t heads) {
  STD_TORCH_CHECK(batch <= kMaxGrid && heads <= kMaxGrid, "batch and KV heads must be at most ", kMaxGrid,
                  " each, got ", batch, " and ", heads, "; take the batch in parts");
}

// One half of a cache, checked but for its sizes' fit with other tensors.
QqCache cache_of(const Tensor& codes, const Tensor& scale, const Tensor& zero, const Tensor& on, const char* name) {
  STD_TORCH_CHECK(codes.dim() == 4 && codes.scalar_type() == ScalarType::Byte, name,
                  " must be uint8 with 4 axes, [B, H, T, D], got ", torch::headeronly::toString(codes.scalar_type()),
                  " ", shape_of(codes));
  check_last_stride(codes, name);
  check_device(codes, on, name);
  for (const Tensor* numbers : {&scale, &zero}) {
    STD_TORCH_CHECK(numbers->dim() == 3 && numbers->size(0) == codes.size(0) && numbers->size(1) == codes.size(1) &&
                        numbers->size(2) == codes.size(2) && numbers->scalar_type() == ScalarType::Half,
                    "scale and zero of ", name, " must be float16 with its first three sizes, ", shape_of(codes),
                    ", got ", torch::headeronly::toString(numbers->scalar_type()), " ", shape_of(*numbers));
    STD_TORCH_CHECK(numbers->size(2) <= 1 || numbers->stride(2) == 1, "scale and zero of ", name,
                    " must have their tokens side by side in memory, got a stride of ", numbers->stride(2),
                    "; call contiguous() on them");
    check_device(*numbers, on, name);
  }
  const auto halves = [](const Tensor& t) { return static_cast<std::uint16_t*>(t.data_ptr()); };
  QqCache cache = {static_cast<std::uint8_t*>(codes.data_ptr()), halves(scale), halves(zero), {}, {}, {}};
  for (int i = 0; i < 3; ++i) {
    cache.codes_stride[i] = codes.stride(i);
    cache.scale_stride[i] = scale.stride(i);
    cache.zero_stride[i] = zero.stride(i);
  }
  return cache;
}

void kv_append(const Tensor& codes, const Tensor& scale, const Tensor& zero, const Tensor& states, std::int64_t at) {
  QqAppend args = {};
  args.cache = cache_of(codes, scale, zero, codes, "codes");
  STD_TORCH_CHECK(states.dim() == 4 && states.size(0) == codes.size(0) && states.size(1) == codes.size(1) &&
                      states.size(3) == codes.size(3),
                  "states must be [B, H, L, D] with the B, H and D of the cache, ", shape_of(codes), ", got ",
                  shape_of(states));
  args.dtype = dtype_of(states.scalar_type(), "states");
  check_last_stride(states, "states");
  check_device(states, codes, "states");
  const std::int64_t room = codes.size(2);
  args.batch = states.size(0);
  args.heads = states.size(1);
  args.length = states.size(2);
  args.dim = states.size(3);
  args.at = at;
  STD_TORCH_CHECK(at >= 0 && args.length <= room && at <= room - args.length, "tokens ", at, " to ", at + args.length,
                  " must fit into the cache's room of ", room);
  STD_TORCH_CHECK(args.batch * args.heads * args.length < kInt32, "states must hold fewer than 2^31 vectors, got ",
                  shape_of(states), "; append them in parts");
  if (states.numel() == 0) return;
  args.states = states.const_data_ptr();
  for (int i = 0; i < 3; ++i) args.states_stride[i] = states.stride(i);
  const Launch launch(codes);
  check_cuda(qq_kv_append(&args, launch.stream()), "kv_append");
}

Tensor kv_dequantize(const Tensor& codes, const Tensor& scale, const Tensor& zero, ScalarType dtype) {
  QqDequantize args = {};
  args.cache = cache_of(codes, scale, zero, codes, "codes");
  args.dtype = dtype_of(dtype, "dtype");
  args.batch = codes.size(0);
  args.heads = codes.size(1);
  args.tokens = codes.size(2);
  args.dim = codes.size(3);
  check_grid(args.batch, args.heads);
  Tensor out = torch::stable::new_empty(codes, codes.sizes(), dtype);
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  const Launch launch(codes);
  check_cuda(qq_kv_dequantize(&args, launch.stream()), "kv_dequantize");
  return out;
}

// Whether attention can read a cache: heads of 8 to 256 elements, every vector at a multiple of 8 bytes.
void check_readable(const Tensor& codes, const char* name) {
  const std::int64_t dim = codes.size(3);
  STD_TORCH_CHECK(dim > 0 && dim % 8 == 0 && dim <= kMaxHeadDim, name, " must have heads of 8, 16, ... ", kMaxHeadDim,
                  " elements for attention on a GPU, got ", dim, kReference);
  std::uint64_t misfit = reinterpret_cast<std::uintptr_t>(codes.const_data_ptr());
  for (int i = 0; i < 3; ++i) misfit |= static_cast<std::uint64_t>(codes.stride(i));
  STD_TORCH_CHECK(misfit % 8 == 0, name, " must begin, and have strides, at multiples of 8 bytes, got strides ",
                  codes.stride(0), ", ", codes.stride(1), ", ", codes.stride(2), "; call clone() on it");
  STD_TORCH_CHECK(codes.size(2) < kInt32 && codes.stride(2) < kInt32, name,
                  " must have fewer than 2^31 tokens, and as many bytes between two, got ", shape_of(codes),
                  " with strides ", codes.stride(0), ", ", codes.stride(1), ", ", codes.stride(2),
                  "; call contiguous() on it");
}

void take_mask(const Tensor& mask, const Tensor& query, QqAttention& args) {
  STD_TORCH_CHECK(mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == args.batch) &&
                      (mask.size(1) == 1 || mask.size(1) == args.heads) && mask.size(2) == args.length &&
                      mask.size(3) == args.tokens && mask.scalar_type() == ScalarType::Bool,
                  "mask must be bool [", args.batch, " or 1, ", args.heads, " or 1, ", args.length, ", ", args.tokens,
                  "], true where a key is seen, got ", torch::headeronly::toString(mask.scalar_type()), " ",
                  shape_of(mask));
  check_device(mask, query, "mask");
  STD_TORCH_CHECK(mask.stride(3) < kInt32, "mask must have its tokens less than 2^31 bytes apart, got ", mask.stride(3),
                  "; call contiguous() on it");
  args.mask = static_cast<const std::uint8_t*>(mask.const_data_ptr());
  for (int i = 0; i < 4; ++i) args.mask_stride[i] = i < 2 && mask.size(i) == 1 ? 0 : mask.stride(i);
}

void take_sizes(const Tensor& query, const Tensor& k_codes, const Tensor& v_codes, QqAttention& args) {
  STD_TORCH_CHECK(query.dim() == 4 && query.size(0) == k_codes.size(0) && query.size(3) == k_codes.size(3) &&
                      v_codes.size(0) == k_codes.size(0) && v_codes.size(1) == k_codes.size(1) &&
                      v_codes.size(2) == k_codes.size(2),
                  "the cache ", shape_of(k_codes), ", ", shape_of(v_codes), " does not fit the query ", shape_of(query),
                  "; all must agree in B, both caches in H and T, query and keys in D");
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.kv_heads = k_codes.size(1);
  args.length = query.size(2);
  args.tokens = k_codes.size(2);
  args.key_dim = k_codes.size(3);
  args.value_dim = v_codes.size(3);
  STD_TORCH_CHECK(args.kv_heads > 0 && args.heads % args.kv_heads == 0, args.heads, " query heads cannot share ",
                  args.kv_heads, " KV heads evenly");
  STD_TORCH_CHECK(args.length <= args.tokens, args.length, " queries need at least as many keys, got ", args.tokens);
  check_grid(args.batch, args.kv_heads);
  STD_TORCH_CHECK(args.batch * args.heads * args.length < kInt32, "query must have fewer than 2^31 rows, got ",
                  shape_of(query), "; take it in parts");
}

// The query as the kernel reads it, 16 bytes at a time; a few numbers, beside a cache of millions.
Tensor aligned_rows(const Tensor& query) {
  const Tensor rows = torch::stable::contiguous(query);
  return reinterpret_cast<std::uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

Tensor kv_decode_attention(const Tensor& query, const Tensor& k_codes, const Tensor& k_scale, const Tensor& k_zero,
                           const Tensor& v_codes, const Tensor& v_scale, const Tensor& v_zero,
                           const std::optional<Tensor>& mask, double scaling) {
  QqAttention args = {};
  args.dtype = dtype_of(query.scalar_type(), "query");
  args.keys = cache_of(k_codes, k_scale, k_zero, query, "k_codes");
  args.values = cache_of(v_codes, v_scale, v_zero, query, "v_codes");
  take_sizes(query, k_codes, v_codes, args);
  check_readable(k_codes, "k_codes");
  check_readable(v_codes, "v_codes");
  if (mask.has_value()) take_mask(*mask, query, args);
  args.scaling = static_cast<float>(scaling);

  const std::int64_t shape[] = {args.batch, args.heads, args.length, args.value_dim};
  Tensor out = torch::stable::new_empty(query, {shape, 4});
  if (out.numel() == 0) return out;
  const Launch launch(query);
  const Tensor rows = aligned_rows(query);
  args.splits = qq_kv_attention_splits(&args, launch.multiprocessors());
  const std::int64_t floats[] = {qq_kv_attention_workspace(&args) / static_cast<std::int64_t>(sizeof(float))};
  const Tensor workspace = torch::stable::new_empty(query, {floats, 1}, ScalarType::Float);
  args.query = rows.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  check_cuda(qq_kv_attention(&args, launch.stream()), "kv_decode_attention");
  return out;
}

// What the kernels were built for, whether torch's streams are there, and how many GPUs or why none.
std::string cuda_build_info() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  const std::string found = error == cudaSuccess
                                ? std::to_string(devices)
                                : "none (error " + std::to_string(int(error)) + ": " + cudaGetErrorString(error) + ")";
  return std::string("archs: " QQUANT_CUDA_BUILT_FOR ", torch streams: ") + (stream_getter() ? "found" : "not found") +
         ", devices: " + found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qquant, m) { m.def("cuda_build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(qquant, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}

STABLE_TORCH_LIBRARY_IMPL(qquant, CUDA, m) {
  m.impl("kv_append", TORCH_BOX(&kv_append));
  m.impl("kv_dequantize", TORCH_BOX(&kv_dequantize));
  m.impl("kv_decode_attention", TORCH_BOX(&kv_decode_attention));
}

extern "C" PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels; importing it registers them.", -1,
                               nullptr};
  return PyModule_Create(&module);
}
