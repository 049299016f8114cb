// The real weights of panels, for products that torch makes: scale * (code - zero) in float32, rounded once to the
// wanted type. The bits are those of weights_reference in linear_ops.py.

#include "linear_codes.h"

namespace qquant {
namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 128;                // of a block: 8 KiB of words
constexpr int kStride = kQqPanelRows + 1;  // words between steps in shared memory: a row's lie in different banks

// A block takes kSteps steps of one panel, blockIdx.y. Words are read 16 bytes at a time as they lie, and written row
// by row: a lane has 8 columns, neighbouring lanes neighbouring columns.
template <class Number, int kBits>
__global__ void __launch_bounds__(kThreads) unpack_panels(QqWeights args) {
  constexpr int kCodes = 32 / kBits, kWords = 8 / kCodes;
  QQ_SHARED_DYN(uint32_t, words);  // [kSteps][kStride]
  const QqPanels& weight = args.weight;
  const int64_t panel = blockIdx.y, first = int64_t(blockIdx.x) * kSteps;
  const int steps = int(min(int64_t(kSteps), weight.steps - first));
  const auto* const from = reinterpret_cast<const uint4*>(weight.words + (panel * weight.steps + first) * kQqPanelRows);
  for (int i = int(threadIdx.x); i < 4 * steps; i += kThreads) {
    uint32_t loaded[4];
    split(load_once(from + i), loaded);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[i / 4 * kStride + 4 * (i % 4) + j] = loaded[j];
  }
  __syncthreads();
  const int64_t columns = weight.steps * kCodes;
  const uint32_t group_steps = uint32_t(weight.group / kCodes);
  constexpr int kEights = kSteps / kWords;  // of a row
  for (int i = int(threadIdx.x); i < kEights * kQqPanelRows; i += kThreads) {
    const int row = i / kEights, step = i % kEights * kWords;
    if (step >= steps) continue;
    float values[8] = {};
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      if (step + word >= steps) continue;
      const uint32_t group = uint32_t(first + step + word) / group_steps;
      const int64_t at = (panel * weight.groups + group) * kQqPanelRows + row;
      const float scale = weight.half_scales
                              ? half_to_float(__ldg(static_cast<const uint16_t*>(weight.scales) + at))
                              : __ldg(static_cast<const float*>(weight.scales) + at);
      const float zero = weight.zeros != nullptr ? float(__ldg(weight.zeros + at)) : float(weight.zero);
#pragma unroll
      for (int j = 0; j < kCodes; ++j)
        values[kCodes * word + j] =
            __fmul_rn(scale, centred<kBits>(words[(step + word) * kStride + row], j, kMagic + zero));
    }
    auto* const to = static_cast<typename Number::Bits*>(args.out) + (panel * kQqPanelRows + row) * columns +
                     (first + step) * kCodes;
    if (columns % 8 == 0) {
      store_eight<Number>(to, values);
    } else {  // 8-bit codes in an odd number of steps: rows begin at multiples of 4 elements
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if ((first + step) * kCodes + j < columns) to[j] = Number::store(values[j]);
    }
  }
}

template <class Number>
void launch(const QqWeights& args, void* stream) {
  const dim3 grid(unsigned((args.weight.steps + kSteps - 1) / kSteps), unsigned(args.weight.panels));
  const auto kernel = args.weight.bits == 4 ? unpack_panels<Number, 4> : unpack_panels<Number, 8>;
  constexpr int kShared = int(sizeof(uint32_t)) * kSteps * kStride;
  QQ_LAUNCH(kernel, grid, kThreads, kShared, stream, args);
}

}  // namespace
}  // namespace qquant

int qq_panel_weights(const QqWeights* args, void* stream) {
  if (args->weight.panels * args->weight.steps == 0) return 0;
  switch (args->dtype) {
    case kQqFloat32:
      qquant::launch<qquant::Float32>(*args, stream);
      break;
    case kQqFloat16:
      qquant::launch<qquant::Float16>(*args, stream);
      break;
    default:
      qquant::launch<qquant::Bfloat16>(*args, stream);
  }
  return QQ_LAST_ERROR();
}
