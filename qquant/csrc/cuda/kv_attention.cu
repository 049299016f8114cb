// Decode attention over an Int8 cache: each block takes one KV head, up to eight of its query rows and a stretch of the
// tokens; a second kernel joins the stretches. Sums are taken in an order that depends on the shape alone.
// What a warp does with a tile of tokens is in kv_tile.h.

#include "kv_tile.h"

namespace qquant {
namespace {

constexpr int kMaxSplits = 256;
constexpr int kJoinThreads = 128;
constexpr float kLog2e = 1.44269504f;

// Blocks of heads up to 128 that fit the shared memory of one multiprocessor: 72 KiB each. The compiler shares out the
// registers accordingly.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMediumBlocks = 2;
#else
constexpr int kMediumBlocks = 3;
#endif

// How a block is made up. A warp holds two tiles in shared memory, 16 KiB of codes for heads of 128; four warps of
// them, or two with longer heads, fit every GPU since compute capability 8.0.
template <int kSegments>
struct Block {
  static constexpr int kWarps = kSegments == 4 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPassTokens = kWarps * kTileTokens;  // tokens taken at a time; stretches are multiples of it
  static constexpr int kPerMultiprocessor = kSegments == 1 ? 4 : kSegments == 2 ? kMediumBlocks : 2;
};

// Shared memory while tiles are read. Afterwards the same bytes hold Joint.
template <int kSegments>
struct Shared {
  Query<kSegments> query;
  Scratch<kSegments> scratch[Block<kSegments>::kWarps];
  float unit[kRows], sum[kRows];
  Sight sight[kRows];
};

// Shared memory while the warps' results are joined.
template <int kSegments>
struct Joint {
  static constexpr int kWarps = Block<kSegments>::kWarps;
  float sums[kWarps][kRows][Sizes<kSegments>::kDim];
  float largest[kWarps][kRows], total[kWarps][kRows];
};

// What follows from the shape, worked out once on the host.
struct Plan {
  int rows;          // query rows of one KV head
  int chunks;        // of eight of them
  int split_tokens;  // of one stretch
};

// One block's share of the work.
struct Work {
  int batch, head, split;
  int first_row, rows;  // among the rows of its KV head; 1 to 8
  int64_t query_row;    // of its first row, among all rows of the query
  int begin, end;       // tokens
};

__device__ __forceinline__ Work find_work(const QqAttention& args, const Plan& plan) {
  Work work;
  work.batch = int(blockIdx.z);
  work.head = int(blockIdx.y);
  work.split = int(blockIdx.x) / plan.chunks;
  work.first_row = (int(blockIdx.x) - work.split * plan.chunks) * kRows;
  work.rows = min(kRows, plan.rows - work.first_row);
  work.query_row = (work.batch * args.kv_heads + work.head) * plan.rows + work.first_row;
  work.begin = work.split * plan.split_tokens;
  work.end = min(work.begin + plan.split_tokens, int(args.tokens));
  return work;
}

// Fixed point of the block's query rows, one warp per row, into shared memory.
template <int kSegments>
__device__ __forceinline__ void quantize_query(const QqAttention& args, const Work& work, Shared<kSegments>& shared) {
  constexpr int kDim = Sizes<kSegments>::kDim, kFours = (kDim + 127) / 128;
  constexpr int kWarps = Block<kSegments>::kWarps, kTurns = kRows / kWarps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 2
  for (int turn = 0; turn < kTurns; ++turn) {
    const int row = turn * kWarps + warp;
    float values[kFours][4] = {};
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      const int d = 128 * four + 4 * lane;
      if (row < work.rows && d < args.key_dim)
        load_four(args.query, (work.query_row + row) * args.key_dim + d, args.dtype, values[four]);
    }
    float largest = 0.0f, sum = 0.0f;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < 4 * kFours; ++i) {
      const float size = fabsf(values[i / 4][i % 4]);
      largest = fmaxf(largest, size);
      finite = finite && size < INFINITY;
    }
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
    finite = __all_sync(0xFFFFFFFFu, finite);
    const Fixed fixed = signed_fixed_point(finite ? largest : 0.0f);
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float step = finite ? rintf(fminf(values[four][i] * fixed.inverse, kMaxSigned)) : 0.0f;
        sum += step;
        words[i] = signed_bytes(int32_t(step));
      }
      transpose_bytes(words);
      const int d = 128 * four + 4 * lane;
      if (d < kDim) shared.query.put(row, d, words);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (lane == 0) {
      shared.sum[row] = sum;
      // A query that is not finite has no fixed point; its result is NaN, as it is in floating point.
      shared.unit[row] = finite ? fixed.unit * args.scaling * kLog2e : NAN;
    }
  }
}

template <int kSegments, bool kWide>
__device__ __forceinline__ Reader<kSegments, kWide> find_head(const QqAttention& args, const Work& work, int lane) {
  constexpr int kGroups = Sizes<kSegments>::kGroups;
  const int element = 16 * (lane % kGroups);
  const auto at = [&](const int64_t(&stride)[3]) { return work.batch * stride[0] + work.head * stride[1]; };
  const QqCache &keys = args.keys, &values = args.values;
  return {keys.codes + at(keys.codes_stride) + element,
          values.codes + at(values.codes_stride) + element,
          uint32_t(keys.codes_stride[2]),
          uint32_t(values.codes_stride[2]),
          {keys.scale + at(keys.scale_stride), keys.zero + at(keys.zero_stride), values.scale + at(values.scale_stride),
           values.zero + at(values.zero_stride)},
          {element < args.key_dim ? 8u : 0u, element + 8 < args.key_dim ? 8u : 0u},
          {element < args.value_dim ? 8u : 0u, element + 8 < args.value_dim ? 8u : 0u}};
}

__device__ __forceinline__ Sight find_sight(const QqAttention& args, const Plan& plan, const Work& work, int g) {
  if (g >= work.rows) return {nullptr, 0, 0};
  const int length = int(args.length), group = plan.rows / length;
  const int row = work.first_row + g, head = row / length, query = row - head * length;
  if (args.mask == nullptr) return {nullptr, 0, min(work.end, int(args.tokens) - length + query + 1)};
  const int64_t* const stride = args.mask_stride;
  const int64_t query_head = int64_t(work.head) * group + head;
  return {args.mask + work.batch * stride[0] + query_head * stride[1] + query * stride[2], uint32_t(stride[3]),
          work.end};
}

// The warps' results into `workspace`, first the sums [rows, splits, Dv], then largest and total [rows, splits, 2].
template <int kSegments>
__device__ __forceinline__ void join_warps(const QqAttention& args, const Work& work, Joint<kSegments>& joint,
                                           const float (&sums)[Sizes<kSegments>::kPairs][4], Softmax state, int lane) {
  constexpr int kWarps = Block<kSegments>::kWarps;
  const int g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  for (int step = 1; step < 4; step *= 2) {
    state.total += __shfl_xor_sync(0xFFFFFFFFu, state.total, step);
    state.zeros += __shfl_xor_sync(0xFFFFFFFFu, state.zeros, step);
  }
  if (t == 0) {
    joint.largest[warp][g] = state.largest;
    joint.total[warp][g] = state.total;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float zeros = __shfl_sync(0xFFFFFFFFu, state.zeros, 4 * (2 * t + i));
    float* row = joint.sums[warp][2 * t + i] + Sizes<kSegments>::kDim / 8 * g;
#pragma unroll
    for (int pair = 0; pair < Sizes<kSegments>::kPairs; ++pair)
      *reinterpret_cast<float2*>(row + 2 * pair) = {sums[pair][i] - zeros, sums[pair][2 + i] - zeros};
  }
  __syncthreads();
  float* const numbers = args.workspace + args.batch * args.heads * args.length * args.splits * args.value_dim;
  for (int row = 0; row < work.rows; ++row) {
    const int64_t place = (work.query_row + row) * args.splits + work.split;
    float largest = joint.largest[0][row];
    for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, joint.largest[w][row]);
    const float base = largest == -INFINITY ? 0.0f : largest;
    float factor[kWarps], total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = power_of_two(joint.largest[w][row] - base);
      total = fmaf(joint.total[w][row], factor[w], total);
    }
    for (int d = threadIdx.x; d < args.value_dim; d += Block<kSegments>::kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum = fmaf(joint.sums[w][row][d], factor[w], sum);
      args.workspace[place * args.value_dim + d] = sum;
    }
    if (threadIdx.x == 0) *reinterpret_cast<float2*>(numbers + 2 * place) = {largest, total};
  }
}

// Grid: (chunks of eight query rows) x splits, KV heads, batch. Chunks of one stretch are neighbours, so that all but
// the first find its codes in the cache.
template <int kSegments, bool kWide>
__global__ void __launch_bounds__(Block<kSegments>::kThreads, Block<kSegments>::kPerMultiprocessor)
    attend(QqAttention args, Plan plan) {
  QQ_SHARED_DYN(unsigned char, bytes);
  auto& shared = *reinterpret_cast<Shared<kSegments>*>(bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Work work = find_work(args, plan);
  if (threadIdx.x < kRows) shared.sight[threadIdx.x] = find_sight(args, plan, work, int(threadIdx.x));
  Scratch<kSegments>& scratch = shared.scratch[warp];
  auto reader = find_head<kSegments, kWide>(args, work, lane);
  const auto last_of = [&](int tile) { return min(kTileTokens, work.end - tile) - 1; };
  int tile = work.begin + kTileTokens * warp, buffer = 0;
  reader.advance(tile);
  uint16_t numbers[4] = {};
  if (tile < work.end) {
    reader.start(scratch.codes[0], last_of(tile), lane);
    reader.load_numbers(tile + min(lane, last_of(tile)), numbers);
  }
  close_group();
  quantize_query<kSegments>(args, work, shared);
  __syncthreads();
  const float query_unit = shared.unit[g], query_sum = shared.sum[g];
  float sums[Sizes<kSegments>::kPairs][4] = {};
  Softmax state;
  for (; tile < work.end; buffer ^= 1) {
    const int mine = tile + kLaneTokens * t;
    scratch.numbers[lane + lane / kLaneTokens] = {half_to_float(numbers[0]), half_to_float(numbers[1]),
                                                  half_to_float(numbers[2]), half_to_float(numbers[3])};
    tile += Block<kSegments>::kPassTokens;
    reader.advance(Block<kSegments>::kPassTokens);
    if (tile < work.end) {
      reader.start(scratch.codes[buffer ^ 1], last_of(tile), lane);
      reader.load_numbers(tile + min(lane, last_of(tile)), numbers);
    }
    close_group();
    wait_for_groups<1>();
    __syncwarp();
    float scores[kLaneTokens];
    score<kSegments>(shared.query, scratch.codes[buffer], lane, scores);
    Weights weights;
    weights.take(scores, scratch.numbers + (kLaneTokens + 1) * t, shared.sight[g].bits(mine), query_unit, query_sum,
                 state);
    add_values<kSegments>(weights, scratch.codes[buffer], lane, sums);
    __syncwarp();  // before this tile's codes and numbers are overwritten
  }
  __syncthreads();
  join_warps<kSegments>(args, work, *reinterpret_cast<Joint<kSegments>*>(bytes), sums, state, lane);
}

// One block per query row: joins the stretches of its tokens in their order.
__global__ void __launch_bounds__(kJoinThreads) join_splits(QqAttention args) {
  const int64_t row = blockIdx.x, first = row * args.splits;
  const int64_t rows = args.batch * args.heads * args.length;
  const float* sums = args.workspace + first * args.value_dim;
  const auto* numbers = reinterpret_cast<const float2*>(args.workspace + rows * args.splits * args.value_dim) + first;
  float largest = -INFINITY;
  for (int s = 0; s < args.splits; ++s) largest = fmaxf(largest, numbers[s].x);
  const float base = largest == -INFINITY ? 0.0f : largest;
  for (int64_t d = threadIdx.x; d < args.value_dim; d += kJoinThreads) {
    float sum = 0.0f, total = 0.0f;
#pragma unroll 4
    for (int s = 0; s < args.splits; ++s) {
      const float factor = power_of_two(numbers[s].x - base);
      total = fmaf(numbers[s].y, factor, total);
      sum = fmaf(sums[s * args.value_dim + d], factor, sum);
    }
    store_any(args.out, row * args.value_dim + d, args.dtype, total == 0.0f ? 0.0f : sum / total);
  }
}

int segments_of(const QqAttention& args) {
  const int64_t dim = args.key_dim > args.value_dim ? args.key_dim : args.value_dim;
  return dim <= 64 ? 1 : dim <= 128 ? 2 : 4;
}

// Whether all codes can be read in groups of 16.
bool wide(const QqAttention& args) {
  uint64_t misfit = reinterpret_cast<uintptr_t>(args.keys.codes) | reinterpret_cast<uintptr_t>(args.values.codes);
  misfit |= uint64_t(args.key_dim) | uint64_t(args.value_dim);
  for (int i = 0; i < 3; ++i) misfit |= uint64_t(args.keys.codes_stride[i]) | uint64_t(args.values.codes_stride[i]);
  return misfit % 16 == 0;
}

int64_t pass_tokens(int segments) {
  return segments == 1 ? Block<1>::kPassTokens : segments == 2 ? Block<2>::kPassTokens : Block<4>::kPassTokens;
}

int blocks_per_multiprocessor(int segments) {
  return segments == 1   ? Block<1>::kPerMultiprocessor
         : segments == 2 ? Block<2>::kPerMultiprocessor
                         : Block<4>::kPerMultiprocessor;
}

int64_t split_tokens(const QqAttention& args, int64_t splits) {
  const int64_t pass = pass_tokens(segments_of(args));
  return (args.tokens + splits * pass - 1) / (splits * pass) * pass;
}

template <int kSegments, bool kWide>
void launch(const QqAttention& args, void* stream) {
  const int rows = int(args.heads / args.kv_heads * args.length);
  const Plan plan = {rows, (rows + kRows - 1) / kRows, int(split_tokens(args, args.splits))};
  const dim3 grid(unsigned(plan.chunks * args.splits), unsigned(args.kv_heads), unsigned(args.batch));
  constexpr size_t kShared = sizeof(Shared<kSegments>), kJoint = sizeof(Joint<kSegments>);
  constexpr int kBytesShared = int(kShared > kJoint ? kShared : kJoint);
  const auto kernel = attend<kSegments, kWide>;
  QQ_ALLOW_SHARED(kernel, kBytesShared);
  QQ_LAUNCH(kernel, grid, Block<kSegments>::kThreads, kBytesShared, stream, args, plan);
}

}  // namespace
}  // namespace qquant

int qq_kv_attention(const QqAttention* args, void* stream) {
  using namespace qquant;
  const int segments = segments_of(*args);
  if (!wide(*args)) {
    segments <= 2 ? launch<2, false>(*args, stream) : launch<4, false>(*args, stream);
  } else if (segments == 1) {
    launch<1, true>(*args, stream);
  } else {
    segments == 2 ? launch<2, true>(*args, stream) : launch<4, true>(*args, stream);
  }
  if (const int error = QQ_LAST_ERROR()) return error;
  const unsigned rows = unsigned(args->batch * args->heads * args->length);
  QQ_LAUNCH(join_splits, rows, kJoinThreads, 0, stream, *args);
  return QQ_LAST_ERROR();
}

int32_t qq_kv_attention_splits(const QqAttention* args, int32_t multiprocessors) {
  using namespace qquant;
  const int64_t rows = args->heads / args->kv_heads * args->length, chunks = (rows + kRows - 1) / kRows;
  const int64_t blocks = args->batch * args->kv_heads * chunks;
  const int64_t room = int64_t(multiprocessors) * blocks_per_multiprocessor(segments_of(*args));
  // What a block costs beside its tokens, counted in tokens: its start, and writing and rereading each row's sums,
  // which are as large as two tokens' codes both times.
  const int64_t overhead = 64 + 4 * (rows < kRows ? rows : kRows);
  int64_t best = 1, lowest = INT64_MAX;
  for (int64_t splits = 1; splits <= kMaxSplits; ++splits) {
    const int64_t each = split_tokens(*args, splits);
    if ((splits - 1) * each >= args->tokens) continue;  // the last would be empty
    const int64_t rounds = (blocks * splits + room - 1) / room;
    if (rounds * (each + overhead) < lowest) {
      lowest = rounds * (each + overhead);
      best = splits;
    }
  }
  return int32_t(best);
}

int64_t qq_kv_attention_workspace(const QqAttention* args) {
  const int64_t rows = args->batch * args->heads * args->length;
  return int64_t(sizeof(float)) * rows * args->splits * (args->value_dim + 2);
}
