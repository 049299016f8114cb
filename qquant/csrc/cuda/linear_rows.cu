// Products with panels: the way in, and what is not the tensor cores' part. Activations put into chunks where they are
// not, sums of several splits joined, and the kernel for float32 activations, which no tensor core takes exactly.

#include "linear_plan.h"

namespace qquant {
namespace {

constexpr int kArrangeThreads = 256;
constexpr int kJoinThreads = 128;
constexpr int kMaxSplits = 16;

// One element of the activations in chunks per thread; blockIdx.y: which token. What fills up a group's last chunk is
// 0.
template <int kBytes>
__global__ void __launch_bounds__(kArrangeThreads) arrange_activations(QqLinear args, LinearPlan plan) {
  using Bits = typename std::conditional<kBytes == 4, uint32_t, uint16_t>::type;
  const int64_t place = int64_t(blockIdx.x) * kArrangeThreads + threadIdx.x, token = blockIdx.y;
  const int64_t per_group = int64_t(plan.chunks_per_group) * kChunk;
  if (place >= int64_t(plan.chunks) * kChunk) return;
  const int codes = 32 / args.weight.bits;
  const int64_t group = int64_t(plan.group_steps) * codes, column = place / per_group * group + place % per_group;
  Bits value = 0;
  if (place % per_group < group && column < args.weight.steps * codes) {
    const int64_t from = args.order == nullptr ? column : __ldg(args.order + column);
    if (from >= args.features) {
      value = Bits(-1);  // NaN: an order can be checked nowhere else without waiting for the GPU
    } else if (from >= 0) {
      value = __ldg(static_cast<const Bits*>(args.x) + token * args.stride + from);
    }
  }
  reinterpret_cast<Bits*>(args.workspace)[token * plan.x_stride + place] = value;
}

// As multiply_tiles, for float32: a lane multiplies its 4 rows and 8 columns with up to 4 tokens.
template <int kBits>
__global__ void __launch_bounds__(kThreads) multiply_float32(QqLinear args, LinearPlan plan) {
  constexpr int kWords = kBits / 4, kTokens = kFloat32Tokens, kCodes = 32 / kBits;
  QQ_SHARED_DYN(float, all);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const Place place = find_place(args.weight, plan);
  const float* const x = static_cast<const float*>(plan.x) + place.first_token * plan.x_stride + 8 * t;
  Cursor<kBits> now(plan, place.begin);
  float totals[4][kTokens] = {}, scales[4] = {}, zeros[4] = {};
  bool fresh = true;
  for (int chunk = place.begin; chunk < place.end; ++chunk) {
    if (fresh) {
      const int at = place.numbers + now.group * kQqPanelRows;
      RowScales stored;
      stored.load(args.weight, at);
      stored.values(args.weight, scales);
      const uint32_t held = load_zeros(args.weight, at);
#pragma unroll
      for (int row = 0; row < 4; ++row) zeros[row] = kMagic + float(zero_of(args.weight, held, row));
    }
    uint32_t words[kWords][4] = {};
#pragma unroll
    for (int word = 0; word < kWords; ++word)
      if (now.holds(plan, word))
        split(load_once(place.words + int64_t(now.step + word) * (kQqPanelRows / 4)), words[word]);
    float values[kTokens][8] = {}, sums[4][kTokens] = {};
#pragma unroll
    for (int token = 0; token < kTokens; ++token)
      if (place.first_token + token < args.tokens)
        load_eight<Float32>(x + token * plan.x_stride + int64_t(chunk) * kChunk, values[token]);
#pragma unroll
    for (int row = 0; row < 4; ++row)
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float code = centred<kBits>(words[k / kCodes][row], k % kCodes, zeros[row]);
#pragma unroll
        for (int token = 0; token < kTokens; ++token)
          sums[row][token] = fmaf(code, values[token][k], sums[row][token]);
      }
#pragma unroll
    for (int row = 0; row < 4; ++row)
#pragma unroll
      for (int token = 0; token < kTokens; ++token)
        totals[row][token] = fmaf(scales[row], sums[row][token], totals[row][token]);
    fresh = now.advance(plan);
  }
#pragma unroll
  for (int row = 0; row < 4; ++row)
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      float sum = totals[row][token];
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
      if (token == t) all[(warp * kTokens + token) * kSumStride + 4 * g + row] = sum;
    }
  __syncthreads();
  store_sums(args, plan, all);
}

// One thread per row, blockIdx.y: which token. Adds up the splits in their order.
__global__ void __launch_bounds__(kJoinThreads) join_linear_splits(QqLinear args, LinearPlan plan) {
  const int64_t row = int64_t(blockIdx.x) * kJoinThreads + threadIdx.x, token = blockIdx.y;
  const int64_t rows = args.weight.panels * kQqPanelRows;
  if (row >= rows) return;
  float sum = plan.partial[token * rows + row];
  for (int split = 1; split < args.splits; ++split) sum += plan.partial[(split * args.tokens + token) * rows + row];
  store_result(args, token, row, sum);
}

void arrange(const QqLinear& args, const LinearPlan& plan, void* stream) {
  const int64_t places = int64_t(plan.chunks) * kChunk;
  const dim3 grid(unsigned((places + kArrangeThreads - 1) / kArrangeThreads), unsigned(args.tokens));
  if (args.dtype == kQqFloat32) {
    QQ_LAUNCH(arrange_activations<4>, grid, kArrangeThreads, 0, stream, args, plan);
  } else {
    QQ_LAUNCH(arrange_activations<2>, grid, kArrangeThreads, 0, stream, args, plan);
  }
}

void multiply(const QqLinear& args, const LinearPlan& plan, void* stream) {
  if (args.dtype != kQqFloat32) {
    launch_tiles(args, plan, stream);
    return;
  }
  const auto kernel = args.weight.bits == 4 ? multiply_float32<4> : multiply_float32<8>;
  constexpr int kShared = int(sizeof(float)) * kWarps * kFloat32Tokens * kSumStride;
  QQ_LAUNCH(kernel, grid_of(args, plan), kThreads, kShared, stream, args, plan);
}

}  // namespace
}  // namespace qquant

int qq_panel_linear(const QqLinear* args, void* stream) {
  using namespace qquant;
  const LinearPlan plan = plan_of(*args);
  if (plan.x != args->x) {
    arrange(*args, plan, stream);
    if (const int error = QQ_LAST_ERROR()) return error;
  }
  multiply(*args, plan, stream);
  if (const int error = QQ_LAST_ERROR()) return error;
  if (plan.partial != nullptr) {
    const int64_t rows = args->weight.panels * kQqPanelRows;
    const dim3 grid(unsigned((rows + kJoinThreads - 1) / kJoinThreads), unsigned(args->tokens));
    QQ_LAUNCH(join_linear_splits, grid, kJoinThreads, 0, stream, *args, plan);
  }
  return QQ_LAST_ERROR();
}

int32_t qq_panel_linear_splits(const QqLinear* args, int32_t multiprocessors) {
  using namespace qquant;
  QqLinear tried = *args;
  tried.splits = 1;
  const LinearPlan whole = plan_of(tried);
  const int64_t blocks = row_blocks(tried, whole) * token_blocks(tried, whole);
  const int64_t room = int64_t(multiprocessors) * (whole.block_tokens == 8 ? 3 : 2);
  // What a block costs beside its chunks, counted in chunks: its start, the first copies and the last sums; and, where
  // there are several splits, another kernel. To be measured on a GPU.
  constexpr int64_t kStart = 8, kJoin = 8;
  int64_t best = 1, lowest = INT64_MAX;
  for (int64_t splits = 1; splits <= kMaxSplits; ++splits) {
    tried.splits = int32_t(splits);
    const int64_t stretch = plan_of(tried).stretch;
    if ((splits - 1) * whole.warps_along * stretch >= whole.chunks && splits > 1) continue;  // the last would be empty
    const int64_t rounds = (blocks * splits + room - 1) / room;
    const int64_t cost = rounds * (stretch + kStart) + (splits > 1 ? kJoin : 0);
    if (cost < lowest) {
      lowest = cost;
      best = splits;
    }
  }
  return int32_t(best);
}

int64_t qq_panel_linear_workspace(const QqLinear* args) {
  using namespace qquant;
  const LinearPlan plan = plan_of(*args);
  const int64_t size = args->dtype == kQqFloat32 ? 4 : 2, rows = args->weight.panels * kQqPanelRows;
  const int64_t arranged = in_chunks(*args) ? 0 : args->tokens * plan.x_stride * size;
  return arranged + (args->splits > 1 ? int64_t(sizeof(float)) * args->splits * args->tokens * rows : 0);
}
