// What one warp does with 32 tokens of a cache: bring their codes to shared memory, scores from the keys, weights, sums
// over the values.
//
// Codes go into the tensor cores as the bytes they are. The other operand, a query or the weights, is cut into three
// bytes of 24-bit fixed point, one product for each, and the three exact int32 sums are put together in float32: as
// exact as float32 multiplication of the codes, and nothing is ever dequantized. Eight query rows share one read of the
// cache.
//
// Lane = 4g + t owns query row g and tokens 8t to 8t + 7 of it. Which token or element sits where inside a product is
// free as long as both operands agree, and is chosen so that 16 neighbouring bytes of a lane are operands as they are,
// and what a product of queries and keys leaves in a lane is of the tokens that it owns.

#pragma once

#include <type_traits>

#include "kv_launch.h"
#include "numbers.h"
#include "ptx.h"

namespace qquant {

constexpr int kTileTokens = 32;
constexpr int kRows = 8;                  // query rows of one product
constexpr int kLaneTokens = 8;            // tokens of a tile that one lane owns
constexpr int kBytes = 3;                 // of a fixed-point number
constexpr int kBlocks = kTileTokens / 8;  // products side by side for the keys: eight tokens each

// Sizes that follow from a head of at most 64 * kSegments elements.
template <int kSegments>
struct Sizes {
  static constexpr int kDim = 64 * kSegments;
  static constexpr int kGroups = kDim / 16;       // 16-byte groups of one token's codes
  static constexpr int kPairs = kDim / 16;        // products for the values: two elements of each lane group at a time
  static constexpr int kValueBytes = kDim / 8;    // of one token's values, in one lane
  static constexpr int kCopies = kGroups;         // copies by each lane for a tile's keys, or its values
  static constexpr int kCopyRows = 32 / kGroups;  // tokens of one copy by all lanes
};

// The codes of a tile in shared memory. Groups of a row change places so that the eight lanes whose reads go together
// find theirs in different banks: those of keys read two neighbouring tokens, those of values every eighth token.
template <int kSegments>
struct Codes {
  static constexpr int kGroups = Sizes<kSegments>::kGroups;
  uint4 keys[kTileTokens * kGroups];
  uint4 values[kTileTokens * kGroups];

  // odd: token % 2, which the caller knows better than the compiler does.
  __device__ __forceinline__ uint4* key(int token, int odd, int group) {
    return keys + token * kGroups + (kSegments == 1 ? group : group ^ odd << 2);
  }

  // eighth: token / 8, likewise.
  __device__ __forceinline__ uint4* value(int token, int eighth, int group) {
    if constexpr (kSegments == 1) return values + (token ^ eighth >> 1) * kGroups + (group ^ (eighth & 1) << 1);
    if constexpr (kSegments == 2) return values + token * kGroups + (group ^ eighth << 1);
    return values + token * kGroups + (group ^ ((eighth & 1) | (eighth & 2) << 1));
  }
};

// The query rows as operands, [segment][half of 16 elements][low and middle bytes, or high][lane].
template <int kSegments>
struct Query {
  uint4 operands[kSegments][2][2][32];

  // Stores bytes of elements d to d + 3 of one row: bytes[i] has byte i of each.
  __device__ __forceinline__ void put(int row, int d, const uint32_t (&bytes)[4]) {
    const int lane = 4 * row + d % 64 / 16, word = d % 8 / 4 * 2;
    uint4(&place)[2][32] = operands[d / 64][d % 16 / 8];
    uint32_t* const low = reinterpret_cast<uint32_t*>(&place[0][lane]) + word;
    uint32_t* const high = reinterpret_cast<uint32_t*>(&place[1][lane]) + word;
    low[0] = bytes[0];
    low[1] = bytes[1];
    high[0] = bytes[2];
    high[1] = 0;  // half of this product is idle
  }
};

// Scale and zero of keys and values of one token.
struct alignas(16) Numbers {
  float key_scale, key_zero, value_scale, value_zero;
};

// One warp's piece of shared memory: one tile is worked on while the next arrives. A gap after every eighth token keeps
// the lanes' reads of numbers in different banks.
template <int kSegments>
struct Scratch {
  Codes<kSegments> codes[2];
  Numbers numbers[kTileTokens + kTileTokens / kLaneTokens];
};

// Where one lane copies a head's codes from: group lane % kGroups of every kCopyRows-th token.
// kWide: sizes and addresses of all vectors are multiples of 16, else of 8.
template <int kSegments, bool kWide>
struct Reader {
  static constexpr int kGroups = Sizes<kSegments>::kGroups, kCopyRows = Sizes<kSegments>::kCopyRows;
  const uint8_t* keys;  // of the tile's first token
  const uint8_t* values;
  uint32_t keys_stride, values_stride;  // from token to token
  const uint16_t* numbers[4];           // of the head's first token: scale and zero of the keys, then of the values
  uint32_t keys_wanted[2], values_wanted[2];  // bytes, 8 or 0, of the group's lower and upper half

  __device__ __forceinline__ void advance(uint32_t tokens) {
    keys += uint64_t(tokens) * keys_stride;
    values += uint64_t(tokens) * values_stride;
  }

  // Starts copying tokens 0 to `last` of the tile that this points at; `last` again in the place of those after it,
  // which the zeros of their weights take out, and zeros beyond a vector's end.
  __device__ __forceinline__ void start(Codes<kSegments>& codes, int last, int lane) const {
    const int row = lane / kGroups, group = lane % kGroups;
#pragma unroll 8
    for (int i = 0; i < Sizes<kSegments>::kCopies; ++i) {
      const int token = i * kCopyRows + row;
      copy(codes.key(token, row % 2, group), keys + uint64_t(uint32_t(min(token, last))) * keys_stride, keys_wanted[0],
           keys_wanted[1]);
    }
#pragma unroll 8
    for (int i = 0; i < Sizes<kSegments>::kCopies; ++i) {
      const int token = i * kCopyRows + row;
      copy(codes.value(token, i * kCopyRows / 8, group), values + uint64_t(uint32_t(min(token, last))) * values_stride,
           values_wanted[0], values_wanted[1]);
    }
  }

  // Scale and zero of one token.
  __device__ __forceinline__ void load_numbers(int token, uint16_t (&bits)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __ldg(numbers[i] + token);
  }

 private:
  static __device__ __forceinline__ void copy(uint4* to, const uint8_t* from, uint32_t lower, uint32_t upper) {
    if constexpr (kWide) {
      copy_async<16>(to, from, 2 * lower);
    } else {
      copy_async<8>(to, from, lower);
      copy_async<8>(reinterpret_cast<uint2*>(to) + 1, from + 8, upper);
    }
  }
};

// What a query row may look at.
struct Sight {
  const uint8_t* mask;  // its row of the mask, or null
  uint32_t mask_stride;
  int limit;  // tokens below it are seen; 0 for a row that is not there

  // One bit for each of the eight tokens from `first` on.
  __device__ __forceinline__ uint32_t bits(int first) const {
    const int count = limit - first;
    uint32_t seen = count >= kLaneTokens ? 0xFFu : count <= 0 ? 0u : (1u << count) - 1u;
    if (mask != nullptr) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        const bool there = seen >> i & 1u;
        if (there && mask[uint64_t(first + i) * mask_stride] == 0) seen &= ~(1u << i);
      }
    }
    return seen;
  }
};

// Softmax of query row g so far, in powers of two: this lane's share of the sums.
struct Softmax {
  float largest = -INFINITY;  // the same in all lanes of the row
  float total = 0.0f;
  float zeros = 0.0f;  // sum of weight * zero, to be taken off every element
};

// sum(query * code) of row g and this lane's tokens, in units of the query's fixed point.
//
// Column c of block j is token 8 (c / 2) + 2j + c % 2, so that the two columns of a result in lane t are tokens 2j and
// 2j + 1 of its own.
template <int kSegments>
__device__ __forceinline__ void score(const Query<kSegments>& query, Codes<kSegments>& codes, int lane,
                                      float (&scores)[kLaneTokens]) {
  const int g = lane / 4, t = lane % 4;
  int32_t sums[kBlocks][2][4] = {};
#pragma unroll 2
  for (int s = 0; s < kSegments; ++s) {
    uint32_t words[kBlocks][4];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      split(*codes.key(8 * (g / 2) + 2 * j + g % 2, g % 2, 4 * s + t), words[j]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, part = i % 2;
      const uint4 q = query.operands[s][half][part][lane];
      const uint32_t a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const uint32_t b[2] = {words[j][2 * half], words[j][2 * half + 1]};
        mma<true>(sums[j][part], a, b);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const int32_t(&parts)[2][4] = sums[i / 2];
    // At most 256 elements of 128 * 255 each: 257 times that still fits 31 bits.
    const int32_t rest = parts[0][2 + i % 2] * 256 + parts[0][i % 2];
    scores[i] = fmaf(float(parts[1][i % 2]), 65536.0f, float(rest));
  }
}

// Three-byte weights of this lane's tokens in row g, as operands, and what the sums so far shrink by.
struct Weights {
  uint32_t bytes[kBytes][2];
  float shrink, unit;

  // From sums of query * code. numbers: of this lane's tokens; query_unit: value of one step of the row's fixed point,
  // times scaling and log2(e); query_sum: sum of the row's fixed-point numbers; seen: of Sight.
  __device__ __forceinline__ void take(float (&x)[kLaneTokens], const Numbers* numbers, uint32_t seen, float query_unit,
                                       float query_sum, Softmax& state) {
    float largest = state.largest;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const float score = fmaf(-numbers[i].key_zero, query_sum, x[i]) * (numbers[i].key_scale * query_unit);
      x[i] = seen >> i & 1u ? score : -INFINITY;
      largest = fmaxf(largest, x[i]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
    const float base = largest == -INFINITY ? 0.0f : largest;  // a row that has seen nothing keeps weights of 0
    float total = 0.0f, zeros = 0.0f, heaviest = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const float share = power_of_two(x[i] - base);
      total += share;
      x[i] = share * numbers[i].value_scale;
      zeros = fmaf(x[i], numbers[i].value_zero, zeros);
      heaviest = fmaxf(heaviest, x[i]);
    }
    shrink = power_of_two(state.largest - base);
    state.largest = largest;
    state.total = fmaf(state.total, shrink, total);
    state.zeros = fmaf(state.zeros, shrink, zeros);
    cut(x, heaviest);
  }

 private:
  __device__ __forceinline__ void cut(const float (&x)[kLaneTokens], float heaviest) {
    heaviest = fmaxf(heaviest, __shfl_xor_sync(0xFFFFFFFFu, heaviest, 1));
    heaviest = fmaxf(heaviest, __shfl_xor_sync(0xFFFFFFFFu, heaviest, 2));
    const Fixed fixed = unsigned_fixed_point(heaviest);
    unit = fixed.unit;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t fours[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) fours[i] = __float2uint_rn(x[4 * half + i] * fixed.inverse);
      transpose_bytes(fours);
#pragma unroll
      for (int byte = 0; byte < kBytes; ++byte) bytes[byte][half] = fours[byte];
    }
  }
};

// sums = sums * shrink + weights * codes. sums[p]: elements 2p and 2p + 1 of this lane's kValueBytes, as an mma's
// result.
template <int kSegments>
__device__ __forceinline__ void add_values(const Weights& weights, Codes<kSegments>& codes, int lane,
                                           float (&sums)[Sizes<kSegments>::kPairs][4]) {
  // Long heads hold so many sums that only half as many codes fit the registers beside them.
  using Load = typename std::conditional<kSegments == 2, uint4, uint2>::type;
  constexpr int kWords = int(sizeof(Load) / 4);
  const int g = lane / 4, t = lane % 4;
  float shrink[2], unit[2];  // of the rows this lane's results are of: 2t and 2t + 1
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    shrink[i] = __shfl_sync(0xFFFFFFFFu, weights.shrink, 4 * (2 * t + i));
    unit[i] = __shfl_sync(0xFFFFFFFFu, weights.unit, 4 * (2 * t + i));
  }
#pragma unroll
  for (int load = 0; load < Sizes<kSegments>::kValueBytes / int(sizeof(Load)); ++load) {
    uint32_t words[kLaneTokens][kWords];
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const int first = Sizes<kSegments>::kValueBytes * g + int(sizeof(Load)) * load;
      const uint4* const group = codes.value(kLaneTokens * t + i, t, first / 16);
      split(reinterpret_cast<const Load*>(group)[first % 16 / int(sizeof(Load))], words[i]);
    }
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t early[4] = {words[0][word], words[1][word], words[2][word], words[3][word]};
      uint32_t late[4] = {words[4][word], words[5][word], words[6][word], words[7][word]};
      transpose_bytes(early);
      transpose_bytes(late);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t a[4] = {early[2 * pair], early[2 * pair + 1], late[2 * pair], late[2 * pair + 1]};
        int32_t parts[kBytes][4] = {};
#pragma unroll
        for (int byte = 0; byte < kBytes; ++byte) mma<false>(parts[byte], a, weights.bytes[byte]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float sum = fmaf(float(parts[2][i]), 65536.0f, float(parts[1][i] * 256 + parts[0][i]));
          float& running = sums[2 * (kWords * load + word) + pair][i];
          running = fmaf(sum, unit[i % 2], running * shrink[i % 2]);
        }
      }
    }
  }
}

}  // namespace qquant
