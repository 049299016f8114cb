// How a product with panels is shared out among blocks and warps, and what happens to the sums: the same for the
// tensor-core kernel of linear_tiles.cu and the float32 kernel of linear_rows.cu.
//
// Columns are taken in chunks of 32 that never reach into the next group; of a chunk, lane t of a row's four has 8. A
// warp takes two panels, 32 rows, and a stretch of chunks; lane g = lane / 4 has rows 4g to 4g + 3 of the 32. The warps
// of a block are `warps_along` neighbouring stretches for each of 8 / warps_along pairs of panels.

#pragma once

#include "linear_codes.h"

namespace qquant {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 32;  // columns
constexpr int kPairRows = 2 * kQqPanelRows;
constexpr int kSumStride = kPairRows + 1;  // floats between tokens in shared memory: neighbours in different banks
constexpr int64_t kMaxStride = 1 << 24;    // elements between tokens: 64 times that is counted in 32 bits
constexpr int kFloat32Tokens = 4;          // of a block, where activations are float32

struct LinearPlan {
  const void* x;   // [tokens][x_stride], chunks side by side, every one at a multiple of 16 bytes
  float* partial;  // [splits][tokens][panels * 16], or null: one split, straight to the results
  int32_t x_stride;
  int32_t chunks, chunks_per_group, group_steps, steps;
  int32_t full;          // whether groups and panels are whole chunks: words of one lie behind those of another
  int32_t stretch;       // chunks of a warp
  int32_t warps_along;   // 1, 2, 4 or 8
  int32_t block_tokens;  // 4, 8, 16 or 32
};

// Whether rows of x can be read as they are.
inline bool in_chunks(const QqLinear& args) {
  const QqPanels& weight = args.weight;
  const int64_t size = args.dtype == kQqFloat32 ? 4 : 2, columns = weight.steps * (32 / weight.bits);
  return args.order == nullptr && columns % kChunk == 0 && (weight.groups == 1 || weight.group % kChunk == 0) &&
         reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
         (args.tokens == 1 || (args.stride * size % 16 == 0 && args.stride < kMaxStride));
}

inline LinearPlan plan_of(const QqLinear& args) {
  const QqPanels& weight = args.weight;
  const int64_t columns = weight.steps * (32 / weight.bits);
  const int64_t group = weight.groups == 1 ? columns : weight.group;
  const int64_t per_group = (group + kChunk - 1) / kChunk;
  LinearPlan plan = {};
  plan.chunks_per_group = int32_t(per_group);
  plan.chunks = int32_t((weight.groups - 1) * per_group +
                        (columns - (weight.groups - 1) * group + kChunk - 1) / kChunk);
  plan.group_steps = int32_t(group / (32 / weight.bits));
  plan.steps = int32_t(weight.steps);
  plan.full = columns % kChunk == 0 && (weight.groups == 1 || weight.group % kChunk == 0);
  // Few tokens: warps share columns out among themselves, and none waits for another block. Many: activations are as
  // many bytes as weights, and warps that share them read them once.
  if (args.dtype == kQqFloat32) {
    plan.block_tokens = kFloat32Tokens;
    plan.warps_along = 8;
  } else {
    plan.block_tokens = args.tokens <= 8 ? 8 : args.tokens <= 16 ? 16 : 32;
    plan.warps_along = args.tokens <= 4 ? 8 : args.tokens <= 8 ? 4 : args.tokens <= 16 ? 2 : 1;
  }
  const int64_t parts = int64_t(args.splits > 0 ? args.splits : 1) * plan.warps_along;
  plan.stretch = int32_t((plan.chunks + parts - 1) / parts);
  const bool direct = in_chunks(args);
  plan.x = direct ? args.x : args.workspace;
  plan.x_stride = !direct ? plan.chunks * kChunk : args.tokens == 1 ? 0 : int32_t(args.stride);
  const int64_t arranged = direct ? 0 : args.tokens * plan.x_stride * (args.dtype == kQqFloat32 ? 4 : 2);
  plan.partial = args.splits > 1 ? reinterpret_cast<float*>(args.workspace + arranged) : nullptr;
  return plan;
}

inline int64_t row_blocks(const QqLinear& args, const LinearPlan& plan) {
  const int64_t block_panels = 2 * kWarps / plan.warps_along;
  return (args.weight.panels + block_panels - 1) / block_panels;
}

inline int64_t token_blocks(const QqLinear& args, const LinearPlan& plan) {
  return (args.tokens + plan.block_tokens - 1) / plan.block_tokens;
}

inline dim3 grid_of(const QqLinear& args, const LinearPlan& plan) {
  return dim3(unsigned(row_blocks(args, plan)), unsigned(args.splits), unsigned(token_blocks(args, plan)));
}

// The tensor-core kernel, for float16 and bfloat16; linear_tiles.cu.
void launch_tiles(const QqLinear& args, const LinearPlan& plan, void* stream);

// Where a lane works.
struct Place {
  const uint4* words;  // of this lane's rows, step 0
  int numbers;         // index of their scales and zeros in group 0
  int begin, end;      // chunks
  int first_token;
};

__device__ __forceinline__ Place find_place(const QqPanels& weight, const LinearPlan& plan) {
  const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4;
  const int pair = int(blockIdx.x) * (kWarps / plan.warps_along) + warp / plan.warps_along;
  const int64_t panel = min(int64_t(2 * pair + g / 4), weight.panels - 1);  // one too many: not stored
  const int part = int(blockIdx.y) * plan.warps_along + warp % plan.warps_along;
  Place place;
  place.words = reinterpret_cast<const uint4*>(weight.words + panel * weight.steps * kQqPanelRows) + g % 4;
  place.numbers = int(panel * weight.groups * kQqPanelRows) + 4 * (g % 4);
  place.begin = min(part * plan.stretch, plan.chunks);
  place.end = min(place.begin + plan.stretch, plan.chunks);
  place.first_token = int(blockIdx.z) * plan.block_tokens;
  return place;
}

// Walks through chunks: which group, and which of its steps are this lane's.
template <int kBits>
struct Cursor {
  static constexpr int kWords = kBits / 4;  // of a row in 8 columns, a step each
  int group, inner, step;                   // inner: chunk of the group; step: this lane's first

  __device__ __forceinline__ Cursor(const LinearPlan& plan, int chunk) {
    group = chunk / plan.chunks_per_group;
    inner = chunk % plan.chunks_per_group;
    step = group * plan.group_steps + (4 * inner + int(threadIdx.x) % 4) * kWords;
  }

  // Whether a group has ended.
  __device__ __forceinline__ bool advance(const LinearPlan& plan) {
    step += 4 * kWords;
    if (++inner < plan.chunks_per_group) return false;
    inner = 0;
    ++group;
    step = group * plan.group_steps + int(threadIdx.x) % 4 * kWords;
    return true;
  }

  // Whether word `word` of this chunk belongs to the group and to the panel.
  __device__ __forceinline__ bool holds(const LinearPlan& plan, int word) const {
    return step + word < min((group + 1) * plan.group_steps, plan.steps);
  }
};

// A finished sum, to the result that its row belongs to.
__device__ __forceinline__ void store_result(const QqLinear& args, int64_t token, int64_t row, float sum) {
  if (args.bias != nullptr) sum += __ldg(args.bias + row);
  void* out = nullptr;
  int64_t feature = 0, width = 0;
#pragma unroll
  for (int i = 0; i < kQqMaxSlices; ++i) {
    if (i >= args.slice_count || row < args.slices[i].panel * kQqPanelRows) continue;
    out = args.slices[i].out;
    width = args.slices[i].width;
    feature = row - args.slices[i].panel * kQqPanelRows;
  }
  if (feature < width) store_any(out, token * width + feature, args.dtype, sum);
}

// Adds up the warps of each pair of panels in their order. sums: [kWarps][block_tokens][kSumStride], rows last.
__device__ __forceinline__ void store_sums(const QqLinear& args, const LinearPlan& plan, const float* sums) {
  const int pairs = kWarps / plan.warps_along;
  for (int i = int(threadIdx.x); i < pairs * kPairRows * plan.block_tokens; i += kThreads) {
    const int pair = i / kPairRows % pairs, token = i / kPairRows / pairs;
    const float* from = sums + (pair * plan.warps_along * plan.block_tokens + token) * kSumStride + i % kPairRows;
    float sum = from[0];
    for (int warp = 1; warp < plan.warps_along; ++warp) sum += from[warp * plan.block_tokens * kSumStride];
    const int64_t at = int64_t(blockIdx.z) * plan.block_tokens + token, rows = args.weight.panels * kQqPanelRows;
    const int64_t row = (int64_t(blockIdx.x) * pairs + pair) * kPairRows + i % kPairRows;
    if (at >= args.tokens || row >= rows) continue;
    if (plan.partial != nullptr) {
      plan.partial[(blockIdx.y * args.tokens + at) * rows + row] = sum;
    } else {
      store_result(args, at, row, sum);
    }
  }
}

}  // namespace qquant
