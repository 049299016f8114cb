// Products with panels on the tensor cores, for float16 and bfloat16 activations and 1 to 64 tokens.
//
// A lane's 16 bytes of words are 4 rows of one step, and hold what it needs of two 16 x 16 operands: since the columns
// of both operands may be permuted alike, lane t of four takes its own 8 columns in both. So neither weights nor
// activations are exchanged between lanes: each copies its own bytes to shared memory some chunks ahead, without
// registers, and waits for nobody but itself. Codes become whole numbers, products are summed in float32 per group, and
// the group's scale multiplies the sum.

#include "linear_plan.h"

namespace qquant {
namespace {

// A warp's chunks under way in shared memory, the current one among them. Of each a lane has kWords vectors of words and
// kTiles of activations, 512 bytes apart; so lanes side by side are in different banks.
template <int kBits, int kTiles>
struct Ring {
  static constexpr int kStages = kBits == 4 && kTiles == 1 ? 6 : 4;  // 2.5 KiB of words on their way at least
  static constexpr int kWords = kBits / 4;
  static constexpr int kStageBytes = 512 * (kWords + kTiles);
  static constexpr int kRingBytes = kStages * kStageBytes * kWarps;
  static constexpr int kSumBytes = int(sizeof(float)) * kWarps * 8 * kTiles * kSumStride;
  static constexpr int kShared = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;

  unsigned char* mine;  // this lane's first vector
  int now = 0;          // bytes from there to the current chunk

  __device__ __forceinline__ explicit Ring(unsigned char* bytes)
      : mine(bytes + int(threadIdx.x) / 32 * (kStages * kStageBytes) + int(threadIdx.x) % 32 * 16) {}

  __device__ __forceinline__ uint4* vector(int stage, int index) const {
    return reinterpret_cast<uint4*>(mine + stage + 512 * index);
  }

  __device__ __forceinline__ int before() const { return now == 0 ? (kStages - 1) * kStageBytes : now - kStageBytes; }

  __device__ __forceinline__ void advance() { now = now == (kStages - 1) * kStageBytes ? 0 : now + kStageBytes; }
};

// This lane's part of the chunks to come.
template <int kBits, int kTiles>
struct Reader {
  static constexpr int kWords = kBits / 4;
  static constexpr int kStepVectors = kQqPanelRows / 4;
  const uint4* words;  // of this lane's rows in its first step of the next chunk
  const uint16_t* x;   // of its first token and its columns of the next chunk
  int tokens;          // from its first to the last
  uint64_t policy;
  Cursor<kBits> at;

  __device__ __forceinline__ Reader(const QqLinear& args, const LinearPlan& plan, const Place& place)
      : at(plan, place.begin) {
    const int lane = int(threadIdx.x) % 32, token = place.first_token + lane / 4;
    words = place.words + int64_t(at.step) * kStepVectors;
    x = static_cast<const uint16_t*>(plan.x) + token * plan.x_stride + int64_t(place.begin) * kChunk + 8 * (lane % 4);
    tokens = int(args.tokens) - token;
    policy = once_policy();
  }

  // Starts copying the next chunk.
  __device__ __forceinline__ void start(const LinearPlan& plan, const Ring<kBits, kTiles>& ring, int stage) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t wanted = plan.full || at.holds(plan, word) ? 16 : 0;
      if constexpr (kTiles < 4) {
        copy_async_once(ring.vector(stage, word), words + word * kStepVectors, wanted, policy);
      } else {  // another block may read the same for other tokens
        copy_async<16>(ring.vector(stage, word), words + word * kStepVectors, wanted);
      }
    }
    const uint16_t* from = x;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile, from += 8 * plan.x_stride)
      copy_async_shared(ring.vector(stage, kWords + tile), from, 8 * tile < tokens ? 16 : 0);
    x += kChunk;
    words += 4 * kWords * kStepVectors;
    if (plan.full) return;
    const int behind = at.step + 4 * kWords;
    at.advance(plan);
    words += (at.step - behind) * kStepVectors;
  }
};

// sums += codes * activations of one chunk: sums[m][tile] of rows 2m and 2m + 1 of this lane's four, as mma's result.
template <class Number, int kBits, int kTiles>
__device__ __forceinline__ void add_chunk(const Ring<kBits, kTiles>& ring, const uint32_t (&offset)[4],
                                          float (&sums)[2][kTiles][4]) {
  constexpr int kWords = kBits / 4;
  uint32_t words[kWords][4], rows[4][4];
#pragma unroll
  for (int word = 0; word < kWords; ++word) split(*ring.vector(ring.now, word), words[word]);
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    uint32_t mine[kWords];
#pragma unroll
    for (int word = 0; word < kWords; ++word) mine[word] = words[word][row];
    to_pairs<Number, kBits>(mine, offset[row], rows[row]);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    uint32_t x[4];
    pair_up<kBits>(*ring.vector(ring.now, kWords + tile), x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t b[2] = {x[2 * half], x[2 * half + 1]};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t a[4] = {rows[2 * m][2 * half], rows[2 * m + 1][2 * half], rows[2 * m][2 * half + 1],
                               rows[2 * m + 1][2 * half + 1]};
        mma<Number>(sums[m][tile], a, b);
      }
    }
  }
}

// totals += scales * sums; sums = 0.
template <int kTiles>
__device__ __forceinline__ void add_group(const QqPanels& weight, const RowScales& stored,
                                          float (&sums)[2][kTiles][4], float (&totals)[2][kTiles][4]) {
  float scales[4];
  stored.values(weight, scales);
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        totals[m][tile][i] = fmaf(scales[2 * m + i / 2], sums[m][tile][i], totals[m][tile][i]);
        sums[m][tile][i] = 0.0f;
      }
}

template <class Number, int kBits, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 2) multiply_tiles(QqLinear args, LinearPlan plan) {
  constexpr int kAhead = Ring<kBits, kTiles>::kStages - 1;
  QQ_SHARED_DYN(unsigned char, bytes);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  Ring<kBits, kTiles> ring(bytes);
  const Place place = find_place(args.weight, plan);
  Reader<kBits, kTiles> reader(args, plan, place);
  int to_start = place.end - place.begin, inner = reader.at.inner, group = reader.at.group;
  for (int i = 0; i < kAhead; ++i) {
    if (to_start-- > 0) reader.start(plan, ring, i * ring.kStageBytes);
    close_group();
  }
  const int last_group = int(args.weight.groups) - 1;
  const auto numbers_of = [&](int of) { return place.numbers + min(of, last_group) * kQqPanelRows; };
  // Zeros are wanted when a group begins, and loaded a group before; scales when it ends, and loaded when it begins.
  uint32_t next_zeros = load_zeros(args.weight, numbers_of(group)), zeros = 0, offset[4];
#pragma unroll
  for (int row = 0; row < 4; ++row) offset[row] = offset_of<Number, kBits>(uint32_t(args.weight.zero));
  RowScales scales = {};
  float sums[2][kTiles][4] = {}, totals[2][kTiles][4] = {};
  bool fresh = true;
  for (; to_start > -kAhead; --to_start) {
    // Into the place of the chunk before this one: its bytes are in registers, and no other lane's were in it.
    if (to_start > 0) reader.start(plan, ring, ring.before());
    close_group();
    if (fresh) {
      scales.load(args.weight, numbers_of(group));
      if (args.weight.zeros != nullptr) {
        zeros = next_zeros;
        next_zeros = load_zeros(args.weight, numbers_of(group + 1));
      }
      ++group;
    }
    // Many sums leave no registers to keep offsets in.
    if (kTiles == 4 || (fresh && args.weight.zeros != nullptr)) {
#pragma unroll
      for (int row = 0; row < 4; ++row) offset[row] = offset_of<Number, kBits>(zero_of(args.weight, zeros, row));
    }
    wait_for_groups<kAhead>();
    add_chunk<Number, kBits, kTiles>(ring, offset, sums);
    ring.advance();
    fresh = ++inner == plan.chunks_per_group;
    if (fresh) {
      add_group<kTiles>(args.weight, scales, sums, totals);
      inner = 0;
    }
  }
  if (!fresh) add_group<kTiles>(args.weight, scales, sums, totals);
  __syncthreads();  // before other warps' bytes are overwritten
  auto* const all = reinterpret_cast<float*>(bytes);
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        all[((warp * kTiles + tile) * 8 + 2 * t + i % 2) * kSumStride + 4 * g + 2 * m + i / 2] = totals[m][tile][i];
  __syncthreads();
  store_sums(args, plan, all);
}

template <class Number, int kBits, int kTiles>
void launch(const QqLinear& args, const LinearPlan& plan, void* stream) {
  const auto kernel = multiply_tiles<Number, kBits, kTiles>;
  constexpr int kShared = Ring<kBits, kTiles>::kShared;
  QQ_ALLOW_SHARED(kernel, kShared);
  QQ_LAUNCH(kernel, grid_of(args, plan), kThreads, kShared, stream, args, plan);
}

template <class Number, int kBits>
void launch(const QqLinear& args, const LinearPlan& plan, void* stream) {
  if (plan.block_tokens == 8) {
    launch<Number, kBits, 1>(args, plan, stream);
  } else if (plan.block_tokens == 16) {
    launch<Number, kBits, 2>(args, plan, stream);
  } else {
    launch<Number, kBits, 4>(args, plan, stream);
  }
}

}  // namespace

void launch_tiles(const QqLinear& args, const LinearPlan& plan, void* stream) {
  const bool half = args.dtype == kQqFloat16;
  if (args.weight.bits == 4) {
    half ? launch<Float16, 4>(args, plan, stream) : launch<Bfloat16, 4>(args, plan, stream);
  } else {
    half ? launch<Float16, 8>(args, plan, stream) : launch<Bfloat16, 8>(args, plan, stream);
  }
}

}  // namespace qquant
