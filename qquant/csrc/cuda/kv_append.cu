// Quantizes new keys or values into an Int8 cache: one range per vector, codes on the rounded grid. The arithmetic is
// that of kv_ops.choose_range and kv_ops.encode, operation by operation and none fused, so that the bits are the same.

#include "kv_launch.h"
#include "numbers.h"

namespace qquant {
namespace {

constexpr int kThreads = 128;
constexpr int kPerLane = 8;  // elements of one vector that one lane of the fast kernel holds

constexpr float kShare = float(1.0 / 255.0);
constexpr float kMinRelativeStep = 1.0f / 2048.0f;
constexpr float kMinStep = 1.0f / 16777216.0f;
constexpr float kMaxStep = 65504.0f;
constexpr float kMaxZero = 2048.0f;

// The stored grid of one vector, and what its codes are computed with.
struct Grid {
  uint16_t scale_bits, zero_bits;
  float inverse, zero;
};

__device__ __forceinline__ Grid choose_grid(float low, float high) {
  const float step = __fsub_rn(__fmul_rn(high, kShare), __fmul_rn(low, kShare));
  const float floor = __fmul_rn(fmaxf(high, -low), kMinRelativeStep);
  const float wanted = fminf(fmaxf(fmaxf(step, floor), kMinStep), kMaxStep);
  Grid grid;
  grid.scale_bits = float_to_half(wanted);
  // The next float16 above: positive ones are ordered as their bits.
  if (half_to_float(grid.scale_bits) < wanted) ++grid.scale_bits;
  const float scale = half_to_float(grid.scale_bits);
  // Out of these bounds only where the step itself was clamped.
  grid.zero_bits = float_to_half(fminf(fmaxf(__fdiv_rn(-low, scale), -kMaxZero), kMaxZero));
  grid.zero = half_to_float(grid.zero_bits);
  grid.inverse = __frcp_rn(scale);
  return grid;
}

__device__ __forceinline__ uint32_t encode(float value, const Grid& grid) {
  const float level = rintf(__fadd_rn(__fmul_rn(value, grid.inverse), grid.zero));
  return uint32_t(fminf(fmaxf(level, 0.0f), 255.0f));
}

// Lowest and highest over `lanes` neighbouring lanes. Every lane of the warp must come here.
__device__ __forceinline__ void reduce_range(float& low, float& high, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, step));
    high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, step));
  }
}

// Where one vector comes from and goes to, in elements.
struct Place {
  int64_t states, codes, scale, zero;
};

__device__ __forceinline__ Place find(const QqAppend& args, uint32_t vector) {
  const uint32_t token = vector % uint32_t(args.length), rest = vector / uint32_t(args.length);
  const int64_t head = rest % uint32_t(args.heads), batch = rest / uint32_t(args.heads), to = args.at + token;
  const auto at = [&](const int64_t(&stride)[3], int64_t t) {
    return batch * stride[0] + head * stride[1] + t * stride[2];
  };
  return {at(args.states_stride, token), at(args.cache.codes_stride, to), at(args.cache.scale_stride, to),
          at(args.cache.zero_stride, to)};
}

// kLanes lanes hold one vector of at most 8 * kLanes elements, all addresses 16-byte groups.
template <class Number, int kLanes>
__global__ void __launch_bounds__(kThreads) append_groups(QqAppend args, uint32_t vectors) {
  const uint32_t vector = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes, first = lane * kPerLane;
  const bool live = vector < vectors && first < args.dim;
  Place place = {0, 0, 0, 0};
  float values[kPerLane];
  float low = INFINITY, high = -INFINITY;
  if (live) {
    place = find(args, vector);
    const auto* source = static_cast<const typename Number::Bits*>(args.states) + place.states + first;
    load_eight<Number>(source, values);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      low = fminf(low, values[i]);
      high = fmaxf(high, values[i]);
    }
  }
  reduce_range(low, high, kLanes);
  if (!live) return;
  const Grid grid = choose_grid(low, high);
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) words[i / 4] |= encode(values[i], grid) << (8 * (i % 4));
  *reinterpret_cast<uint2*>(args.cache.codes + place.codes + first) = {words[0], words[1]};
  if (lane == 0) {
    args.cache.scale[place.scale] = grid.scale_bits;
    args.cache.zero[place.zero] = grid.zero_bits;
  }
}

// One warp per vector of any length, element by element: for shapes and addresses that the fast kernel cannot take.
template <class Number>
__global__ void __launch_bounds__(kThreads) append_elements(QqAppend args, uint32_t vectors) {
  const uint32_t vector = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (vector >= vectors) return;  // a whole warp at a time
  const Place place = find(args, vector);
  const auto* source = static_cast<const typename Number::Bits*>(args.states) + place.states;
  float low = INFINITY, high = -INFINITY;
  for (int64_t d = lane; d < args.dim; d += 32) {
    const float value = Number::load(source[d]);
    low = fminf(low, value);
    high = fmaxf(high, value);
  }
  reduce_range(low, high, 32);
  const Grid grid = choose_grid(low, high);
  for (int64_t d = lane; d < args.dim; d += 32)
    args.cache.codes[place.codes + d] = uint8_t(encode(Number::load(source[d]), grid));
  if (lane == 0) {
    args.cache.scale[place.scale] = grid.scale_bits;
    args.cache.zero[place.zero] = grid.zero_bits;
  }
}

template <class Number>
int launch(const QqAppend& args, void* stream) {
  const uint32_t vectors = uint32_t(args.batch * args.heads * args.length);
  uintptr_t misfit = reinterpret_cast<uintptr_t>(args.states) % 16 + reinterpret_cast<uintptr_t>(args.cache.codes) % 8;
  misfit += uintptr_t(args.dim % kPerLane);
  for (int i = 0; i < 3; ++i) misfit += uintptr_t((args.states_stride[i] | args.cache.codes_stride[i]) % kPerLane != 0);
  auto kernel = append_elements<Number>;
  int lanes = 32;
  if (misfit == 0 && args.dim <= 32 * kPerLane) {
    lanes = args.dim <= 8 * kPerLane ? 8 : args.dim <= 16 * kPerLane ? 16 : 32;
    kernel = lanes == 8    ? append_groups<Number, 8>
             : lanes == 16 ? append_groups<Number, 16>
                           : append_groups<Number, 32>;
  }
  const uint32_t per_block = uint32_t(kThreads / lanes);
  QQ_LAUNCH(kernel, (vectors + per_block - 1) / per_block, kThreads, 0, stream, args, vectors);
  return QQ_LAST_ERROR();
}

}  // namespace
}  // namespace qquant

int qq_kv_append(const QqAppend* args, void* stream) {
  if (args->batch * args->heads * args->length * args->dim == 0) return 0;
  switch (args->dtype) {
    case kQqFloat32:
      return qquant::launch<qquant::Float32>(*args, stream);
    case kQqFloat16:
      return qquant::launch<qquant::Float16>(*args, stream);
    default:
      return qquant::launch<qquant::Bfloat16>(*args, stream);
  }
}
