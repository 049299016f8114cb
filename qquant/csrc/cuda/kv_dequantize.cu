// Recovers a stretch of an Int8 cache: scale * (code - zero) in float32, neither operation fused, rounded once to the
// wanted type. The bits are those of kv_ops.decode.

#include "kv_launch.h"
#include "numbers.h"

namespace qquant {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;        // codes of one load: 8 bytes in, 16 or 32 bytes out
constexpr int kTokensPerThread = 4;  // loads in flight before the first is used

__device__ __forceinline__ float decode(uint32_t code, float scale, float zero) {
  return __fmul_rn(scale, __fsub_rn(float(code), zero));
}

// Where head and batch of this block begin.
struct Head {
  const uint8_t* codes;
  const uint16_t* scale;
  const uint16_t* zero;
  int64_t out;
};

__device__ __forceinline__ Head find(const QqDequantize& args) {
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  const auto at = [&](const int64_t(&stride)[3]) { return batch * stride[0] + head * stride[1]; };
  return {args.cache.codes + at(args.cache.codes_stride), args.cache.scale + at(args.cache.scale_stride),
          args.cache.zero + at(args.cache.zero_stride), (batch * args.heads + head) * args.tokens * args.dim};
}

// threadIdx.x: which 8 codes of a token; threadIdx.y: which token. All addresses multiples of 8 elements.
template <class Number>
__global__ void __launch_bounds__(kThreads) dequantize_groups(QqDequantize args) {
  const Head head = find(args);
  const int64_t d = int64_t(threadIdx.x) * kPerThread;
  const int64_t first = int64_t(blockIdx.x) * blockDim.y * kTokensPerThread + threadIdx.y;
  uint2 codes[kTokensPerThread];
  float scale[kTokensPerThread], zero[kTokensPerThread];
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int64_t token = first + i * int64_t(blockDim.y);
    if (token >= args.tokens) continue;
    codes[i] = __ldg(reinterpret_cast<const uint2*>(head.codes + token * args.cache.codes_stride[2] + d));
    scale[i] = half_to_float(__ldg(head.scale + token * args.cache.scale_stride[2]));
    zero[i] = half_to_float(__ldg(head.zero + token * args.cache.zero_stride[2]));
  }
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int64_t token = first + i * int64_t(blockDim.y);
    if (token >= args.tokens) continue;
    const uint32_t words[2] = {codes[i].x, codes[i].y};
    float values[kPerThread];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) values[j] = decode(words[j / 4] >> (8 * (j % 4)) & 0xFFu, scale[i], zero[i]);
    store_eight<Number>(static_cast<typename Number::Bits*>(args.out) + head.out + token * args.dim + d, values);
  }
}

// One warp per token, element by element: for vectors and addresses that the fast kernel cannot take.
template <class Number>
__global__ void __launch_bounds__(kThreads) dequantize_elements(QqDequantize args) {
  const Head head = find(args);
  const int64_t token = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (token >= args.tokens) return;
  const float scale = half_to_float(head.scale[token * args.cache.scale_stride[2]]);
  const float zero = half_to_float(head.zero[token * args.cache.zero_stride[2]]);
  auto* target = static_cast<typename Number::Bits*>(args.out) + head.out + token * args.dim;
  for (int64_t d = threadIdx.x % 32; d < args.dim; d += 32)
    target[d] = Number::store(decode(head.codes[token * args.cache.codes_stride[2] + d], scale, zero));
}

template <class Number>
int launch(const QqDequantize& args, void* stream) {
  uintptr_t misfit = reinterpret_cast<uintptr_t>(args.cache.codes) % 8 + reinterpret_cast<uintptr_t>(args.out) % 16;
  misfit += uintptr_t(args.dim % kPerThread);
  for (const int64_t stride : args.cache.codes_stride) misfit += uintptr_t(stride % kPerThread != 0);
  const auto blocks = [&](int64_t tokens) {
    return dim3(unsigned((args.tokens + tokens - 1) / tokens), unsigned(args.heads), unsigned(args.batch));
  };
  if (misfit == 0 && args.dim <= int64_t(kThreads) * kPerThread) {
    const unsigned across = unsigned(args.dim / kPerThread), down = kThreads / across;
    const auto kernel = dequantize_groups<Number>;
    QQ_LAUNCH(kernel, blocks(int64_t(down) * kTokensPerThread), dim3(across, down), 0, stream, args);
  } else {
    const auto kernel = dequantize_elements<Number>;
    QQ_LAUNCH(kernel, blocks(kThreads / 32), kThreads, 0, stream, args);
  }
  return QQ_LAST_ERROR();
}

}  // namespace
}  // namespace qquant

int qq_kv_dequantize(const QqDequantize* args, void* stream) {
  if (args->batch * args->heads * args->tokens * args->dim == 0) return 0;
  switch (args->dtype) {
    case kQqFloat32:
      return qquant::launch<qquant::Float32>(*args, stream);
    case kQqFloat16:
      return qquant::launch<qquant::Float16>(*args, stream);
    default:
      return qquant::launch<qquant::Bfloat16>(*args, stream);
  }
}
