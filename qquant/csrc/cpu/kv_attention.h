// Attention of a few queries over Int8 keys and values: the contract between the driver (kv_attention.cpp) and the
// arithmetic of one instruction set (kv_attention_*.cpp). Knows no torch.
//
// Both products run on integers. A vector of float32, a query or the weights of one chunk of tokens, is rounded to
// 16-bit fixed point, x ~ step * X; the product of X with the stored codes is exact in int32; and the zeros are taken
// off with the same X, so that what rounding costs is relative to keys and values, not to codes.

#pragma once

#include <cstdint>

#include "half.h"

namespace qquant {

constexpr int kLine = 64;           // bytes of a cache line, and of the widest vector
constexpr int kTileRows = 32;       // query rows of one KV head that share one pass over its keys and values
constexpr int kSplitTokens = 1024;  // tokens of one task where there are few heads
constexpr int kExact = 256;         // terms of a sum that surely stays within int32: 255 * kLargest * kExact < 2^31

// Most tokens whose scores are taken before their values are read. One row goes that far, because memory is at its best
// in long runs; several rows compute for longer than they read, and take kExact, which is
// also how far apart their scores and weights lie.
constexpr int kChunk = 2048;

constexpr int kUsualHead = 256;  // head size up to which everything is at its fastest

// Largest |X|: hi = (X + 128) >> 8 then fits int8.
constexpr int kLargest = 32639;

constexpr std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

// Codes [B, H, T, D] uint8; strides in bytes, that of D is 1.
struct Codes {
  const std::uint8_t* data;
  std::int64_t batch, head, token, size;
};

// Numbers [B, H, T] float16; strides in elements, that of T is 1.
struct Numbers {
  const std::uint16_t* data;
  std::int64_t batch, head;
};

struct Attention {
  std::int64_t batch, kv_heads, group, length, tokens;  // group: query heads per KV head; length: queries per head
  const void* query;                                    // [B, kv_heads * group, length, keys.size]
  std::int64_t query_batch, query_head, query_row;      // strides in elements
  void* out;                                            // [B, kv_heads * group, length, values.size], contiguous
  Real dtype;                                           // of query and out
  Codes keys, values;
  Numbers k_scale, k_zero, v_scale, v_zero;
  const std::uint8_t* mask;  // [B, heads, length, T] bool, 0 where hidden, stride of T is 1; null: causal
  std::int64_t mask_batch, mask_head, mask_row;
  float scaling;

  std::int64_t rows() const { return group * length; }
  std::int64_t tile_rows() const { return rows() < kTileRows ? rows() : kTileRows; }
  std::int64_t tiles() const { return (rows() + kTileRows - 1) / kTileRows; }
  // By shape alone, so that the result does not depend on the number of threads.
  std::int64_t splits() const {
    return batch * kv_heads * tiles() >= 32 || tokens == 0 ? 1 : (tokens + kSplitTokens - 1) / kSplitTokens;
  }
  std::int64_t tasks() const { return batch * kv_heads * tiles() * splits(); }
  // float32 per row of a task's result when there are several splits: values, then peak and total.
  std::int64_t partial_row() const { return values.size + 2; }
};

struct AttentionKernels;

// Tasks [begin, end). partial: [tasks, tile_rows, partial_row] float32, used when there are several splits.
void attend(const Attention& problem, const AttentionKernels& kernels, std::int64_t begin, std::int64_t end,
            float* partial);

// Puts the splits of every tile together, in order.
void merge_splits(const Attention& problem, const AttentionKernels& kernels, const float* partial);

// What is known of one query row while its chunks go by. Scores are kept times log2(e), for exp2.
struct Row {
  float step;           // query ~ step * X, scaling and log2(e) included
  float offset;         // sum of X
  float peak;           // largest score so far
  float total;          // sum of exp2(score - peak)
  float fade;           // of this chunk: factor on everything before it
  float weight_step;    // of this chunk: weight * v_scale ~ weight_step * W
  float weight_offset;  // of this chunk: sum of W * v_zero
};

// Scales and zeros of one chunk, widened.
struct ChunkNumbers {
  alignas(kLine) float k_scale[kChunk], k_zero[kChunk], v_scale[kChunk], v_zero[kChunk];
};

// The arithmetic of one instruction set. Fixed-point vectors take fixed_bytes(n) bytes in a layout of its own.
struct AttentionKernels {
  std::int64_t chunk_of_one;  // tokens per chunk where there is one row: at most kChunk
  // out has room up to a multiple of kLine, for kernels that want zeros there.
  void (*widen)(const std::uint16_t* halves, std::int64_t count, float* out);
  // Returns the largest magnitude, or NaN where anything is not finite.
  float (*load)(const void* data, std::int64_t count, Real dtype, float* out);
  void (*store)(const float* data, std::int64_t count, Real dtype, void* out);
  // fixed = X = round(x * inverse), then zeros up to a multiple of kLine. x is readable up to there. Returns the sum of
  // X.
  std::int32_t (*to_fixed)(const float* x, std::int64_t count, float inverse, std::int8_t* fixed);
  // In both products `ahead` is memory that will be read next, about as many bytes as there are codes: kernels that
  // compute for long ask for it on the way.
  //
  // scores[row][kExact] = X[row] . codes[token], int32. Rows of X lie query_stride(size) apart, those of W below
  // fixed_bytes(kExact).
  void (*score)(const std::int8_t* fixed, std::int64_t rows, const std::uint8_t* codes, std::int64_t stride,
                std::int64_t tokens, std::int64_t size, std::int32_t* scores, const std::uint8_t* ahead);
  // A chunk's scores to fixed-point weights, of the tokens with seen[row][token] != 0 or, where seen[row] is null,
  // token < visible[row].
  void (*weigh)(std::int32_t* scores, const ChunkNumbers& numbers, const std::uint8_t* const* seen,
                const std::int64_t* visible, std::int64_t tokens, std::int64_t rows, Row* state, std::int8_t* fixed);
  // sums[row][sums_stride] = sums * fade + weight_step * (W[row] . codes - weight_offset).
  void (*accumulate)(const std::int8_t* fixed, const Row* state, std::int64_t rows, const std::uint8_t* codes,
                     std::int64_t stride, std::int64_t tokens, std::int64_t size, float* sums, std::int64_t sums_stride,
                     std::int8_t* packed, const std::uint8_t* ahead);
};

// Bytes of a fixed-point vector of `count` numbers: two each, padded.
constexpr std::int64_t fixed_bytes(std::int64_t count) { return 2 * round_up(count, kLine); }

// Bytes from one row's fixed-point query to the next; a constant for the usual heads.
constexpr std::int64_t query_stride(std::int64_t size) { return fixed_bytes(size <= kUsualHead ? kUsualHead : size); }

const AttentionKernels& attention_kernels();

// Products of kAttentionAvx512, which fill a file of their own.
void score_avx512(const std::int8_t* fixed, std::int64_t rows, const std::uint8_t* codes, std::int64_t stride,
                  std::int64_t tokens, std::int64_t size, std::int32_t* scores, const std::uint8_t* ahead);
void accumulate_avx512(const std::int8_t* fixed, const Row* state, std::int64_t rows, const std::uint8_t* codes,
                       std::int64_t stride, std::int64_t tokens, std::int64_t size, float* sums,
                       std::int64_t sums_stride, std::int8_t* packed, const std::uint8_t* ahead);

extern const AttentionKernels kAttentionPortable, kAttentionAvx2, kAttentionAvx512;

}  // namespace qquant
