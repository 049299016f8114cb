// Products with packed weights in pairs of 16-bit numbers, which vpmaddwd multiplies and adds exactly. The text of two
// kernels: linear_avx2.cpp and linear_avx512_plain.cpp define QQ_PAIRS (the instruction set) and Vector (registers of
// it, and of how many rows of codes they hold the sums), and include this file once each.
//
// A word shifted right by i codes holds, in its low and its high half, the codes of columns i and i + kPairs, kPairs
// being half the codes of a word; activations are stored in those pairs. 24 bits are two planes of 16-bit numbers,
// high * 256 + low.

#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "bfloat16_vectors.h"
#include "isa.h"
#include "linear.h"

namespace qquant {

namespace {

using Int = Vector::Int;
using Float = Vector::Float;

constexpr int kVectors = int(kPanelRows) / Vector::kLanes;  // registers for one number of each row of a panel
constexpr std::int64_t kFewRows = 4;   // for up to so many rows of codes, words go into products directly;
constexpr std::int64_t kTokens = 48;   // for more, a block of the weight is unpacked once for each so many tokens

int planes_of(const Linear& problem) { return problem.activation_bits == 24 ? 2 : 1; }

// The workspace: codes, [block][token][plane][column of the block]; then steps, [block][token]; then sums of the codes
// of a block, [block][token][plane].
struct Workspace {
  std::int16_t* codes;
  float* steps;
  std::int32_t* sums;

  Workspace(const Linear& problem, std::uint8_t* bytes) {
    const std::int64_t codes_bytes = 2 * problem.tokens * planes_of(problem) * problem.weight.columns();
    codes = reinterpret_cast<std::int16_t*>(bytes);
    steps = reinterpret_cast<float*>(bytes + codes_bytes);
    sums = reinterpret_cast<std::int32_t*>(bytes + codes_bytes + 4 * problem.tokens * problem.weight.blocks());
  }
};

std::int64_t workspace_bytes(const Linear& problem) {
  const std::int64_t planes = planes_of(problem);
  return problem.tokens * (2 * planes * problem.weight.columns() + 4 * (1 + planes) * problem.weight.blocks());
}

std::int64_t any_grain(const Linear&) { return 1; }

// Eight numbers of the activations' dtype.
QQ_PAIRS QQ_INLINE __m256 load_eight(const void* data, std::int64_t at, Real dtype) {
  if (dtype == Real::float32) return _mm256_loadu_ps(static_cast<const float*>(data) + at);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(data) + at));
  if (dtype == Real::float16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

QQ_PAIRS QQ_INLINE void store_eight(void* data, std::int64_t at, __m256 x, Real dtype) {
  if (dtype == Real::float32) return _mm256_storeu_ps(static_cast<float*>(data) + at, x);
  __m128i half;
  if (dtype == Real::float16) {
    half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    half = bfloat16_of(x);
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(data) + at), half);
}

// Columns begin to begin + width of a token as float32, then zeros up to a multiple of eight.
QQ_PAIRS QQ_INLINE void load_block(const Linear& problem, std::int64_t token, std::int64_t begin, std::int64_t width,
                                   float* values) {
  const std::int64_t row = token * problem.stride;
  std::int64_t k = 0;
  if (problem.order == nullptr) {
    for (; k + 8 <= width; k += 8)
      _mm256_store_ps(values + k, load_eight(problem.x, row + begin + k, problem.dtype));
    for (; k < width; ++k) values[k] = load_real(problem.x, row + begin + k, problem.dtype);
  } else {
    for (; k < width; ++k) {
      const std::int32_t from = problem.order[begin + k];
      values[k] = from < 0 ? 0.0f : load_real(problem.x, row + from, problem.dtype);
    }
  }
  for (; k % 8 != 0; ++k) values[k] = 0.0f;
}

// Bits of magnitudes compare as integers, and those of NaN are the largest.
QQ_PAIRS QQ_INLINE float largest_of(const float* values, std::int64_t width) {
  __m256i top = _mm256_setzero_si256();
  for (std::int64_t k = 0; k < width; k += 8) {
    const __m256i raw = _mm256_castps_si256(_mm256_load_ps(values + k));
    top = _mm256_max_epu32(top, _mm256_and_si256(raw, _mm256_set1_epi32(0x7fffffff)));
  }
  alignas(32) std::uint32_t parts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), top);
  return float_of(*std::max_element(parts, parts + 8));
}

QQ_PAIRS QQ_INLINE std::int32_t total_of(__m256i x) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// Stores eight numbers that 16 bits hold in the pairs of words; four where only so many are left.
QQ_PAIRS QQ_INLINE void store_pairs(std::int16_t* out, __m256i codes, __m128i pairs, bool whole) {
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  const __m128i paired = _mm_shuffle_epi8(packed, pairs);
  if (whole)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), paired);
  else
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), paired);
}

// The codes of a block; their sums go to sums[0] and, for 24 bits, sums[1]. Where the step is NaN the codes are
// anything: the result is NaN.
QQ_PAIRS QQ_INLINE void store_codes(const Linear& problem, const float* values, std::int64_t width, float step,
                                    std::int16_t* codes, std::int32_t* sums) {
  const __m128i pairs = problem.weight.bits == 4 ? _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
                                                 : _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const int bits = problem.activation_bits;
  const __m256 limit = _mm256_set1_ps(float(bits == 8 ? kLimit8 : bits == 16 ? kLimit16 : kLimit24));
  // The inverse of a power of two is exact; of the step for 8 bits it would not be.
  const __m256 factor = _mm256_set1_ps(step > 0.0f ? (bits == 8 ? step : 1.0f / step) : 1.0f);
  __m256i total = _mm256_setzero_si256(), low_total = _mm256_setzero_si256();
  for (std::int64_t k = 0; k < width; k += 8) {
    const __m256 x = step > 0.0f ? _mm256_load_ps(values + k) : _mm256_setzero_ps();
    const __m256 wanted = bits == 8 ? _mm256_div_ps(x, factor) : _mm256_mul_ps(x, factor);
    const __m256 kept = _mm256_max_ps(_mm256_min_ps(wanted, limit), _mm256_sub_ps(_mm256_setzero_ps(), limit));
    __m256i code = _mm256_cvtps_epi32(kept);
    if (bits == 24) {
      // To the nearest multiple of 256, and what is left, -128..127.
      const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(code, _mm256_set1_epi32(128)), 8);
      const __m256i low = _mm256_sub_epi32(code, _mm256_slli_epi32(high, 8));
      low_total = _mm256_add_epi32(low_total, low);
      store_pairs(codes + width + k, low, pairs, k + 8 <= width);
      code = high;
    }
    total = _mm256_add_epi32(total, code);
    store_pairs(codes + k, code, pairs, k + 8 <= width);
  }
  sums[0] = total_of(total);
  if (bits == 24) sums[1] = total_of(low_total);
}

QQ_PAIRS void encode(const Linear& problem, std::int64_t first, std::int64_t last, std::uint8_t* bytes) {
  const Panels& weight = problem.weight;
  const Workspace space(problem, bytes);
  const std::int64_t blocks = weight.blocks(), planes = planes_of(problem);
  alignas(32) float values[kBlockColumns];
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t begin = weight.begin_of(block), width = weight.end_of(block) - begin;
    for (std::int64_t token = first; token < last; ++token) {
      load_block(problem, token, begin, width, values);
      const std::int64_t at = block * problem.tokens + token;
      const float step = step_of(largest_of(values, width), problem.activation_bits);
      space.steps[at] = step;
      store_codes(problem, values, width, step, space.codes + planes * (problem.tokens * begin + token * width),
                  space.sums + planes * at);
    }
  }
}

// Codes of columns i and i + kPairs of a word, for each row.
template <int BITS>
QQ_PAIRS QQ_INLINE Int pair_of(Int word, int i) {
  if ((i + 1) * BITS == 16) return Vector::shifted(word, i * BITS);  // nothing is left above
  return Vector::masked(Vector::shifted(word, i * BITS), (1 << BITS) - 1);
}

// Unpacks a block of one panel: [pair][row], 32 bits each.
template <int BITS>
QQ_PAIRS void unpack(const std::uint32_t* words, std::int64_t width, std::uint32_t* pairs) {
  constexpr int kPairs = 16 / BITS;
  for (std::int64_t step = 0; step < width / (2 * kPairs); ++step)
    for (int v = 0; v < kVectors; ++v) {
      const Int word = Vector::load(words + step * kPanelRows + v * Vector::kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i)
        Vector::store(pairs + (step * kPairs + i) * kPanelRows + v * Vector::kLanes, pair_of<BITS>(word, i));
    }
}

// One block of one panel and the activations that meet it.
struct Block {
  const std::uint32_t* weights;  // words, or pairs that unpack made of them
  const std::int16_t* codes;     // [token][plane][width]
  const float* steps;            // [token]
  const std::int32_t* sums;      // [token][plane]
  std::int64_t width;
  const float* scale;            // [16]
  const std::int32_t* zero;      // [16]
};

// Adds a block's products to totals, [token][16].
template <int BITS, int PLANES, bool UNPACKED, int TOKENS>
QQ_PAIRS void add_block(const Block& block, float* totals) {
  constexpr int kPairs = 16 / BITS, kRows = TOKENS * PLANES;
  Int sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector::all(0);
  const std::int64_t width = block.width;
  for (std::int64_t step = 0; step < width / (2 * kPairs); ++step) {
    const std::int16_t* const codes = block.codes + step * 2 * kPairs;
    Int word[kVectors];
    if (!UNPACKED)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        word[v] = Vector::load(block.weights + step * kPanelRows + v * Vector::kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      Int pair[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        pair[v] = UNPACKED ? Vector::load(block.weights + (step * kPairs + i) * kPanelRows + v * Vector::kLanes)
                           : pair_of<BITS>(word[v], i);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        std::int32_t two;
        std::memcpy(&two, codes + r * width + 2 * i, 4);
        const Int x = Vector::all(two);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = Vector::add(sums[r][v], Vector::madd(pair[v], x));
          // Else GCC adds products of several pairs first, and runs out of registers for them.
          asm("" : "+v"(sums[r][v]));
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Int zero = Vector::load(block.zero + v * Vector::kLanes);
      Float sum = Vector::real(
          Vector::subtract(sums[t * PLANES][v], Vector::times(zero, Vector::all(block.sums[t * PLANES]))));
      if (PLANES == 2) {
        const Int low = Vector::subtract(sums[t * PLANES + PLANES - 1][v],
                                         Vector::times(zero, Vector::all(block.sums[t * PLANES + PLANES - 1])));
        sum = Vector::fused(sum, Vector::all_real(256.0f), Vector::real(low));
      }
      float* const total = totals + t * kPanelRows + v * Vector::kLanes;
      // The steps may be near the ends of float32's range, so the sum meets their product with the scale last.
      const Float scale =
          Vector::times_real(Vector::load_real(block.scale + v * Vector::kLanes), Vector::all_real(block.steps[t]));
      Vector::store_real(total, Vector::fused(sum, scale, Vector::load_real(total)));
    }
}

using AddBlock = void (*)(const Block&, float*);

// The version for 1 to kTile tokens.
template <int BITS, int PLANES, bool UNPACKED, std::size_t... INDEX>
AddBlock add_block_for(std::int64_t tokens, std::index_sequence<INDEX...>) {
  constexpr AddBlock kBlocks[] = {add_block<BITS, PLANES, UNPACKED, int(INDEX) + 1>...};
  return kBlocks[tokens - 1];
}

// Products of tokens `first` to `first + count` with one panel, [token][16].
template <int BITS, int PLANES>
QQ_PAIRS void multiply_panel(const Linear& problem, const Workspace& space, std::int64_t panel, std::int64_t first,
                             std::int64_t count, float* totals) {
  const Panels& weight = problem.weight;
  constexpr std::int64_t kColumns = 32 / BITS, kFew = kFewRows / PLANES;
  alignas(64) std::uint32_t pairs[kBlockColumns / 2 * kPanelRows];
  alignas(64) float scale[kPanelRows];
  alignas(64) std::int32_t zero[kPanelRows];
  std::fill(totals, totals + count * kPanelRows, 0.0f);
  constexpr int kTile = Vector::kRows / PLANES;
  const AddBlock few = add_block_for<BITS, PLANES, false>(std::min(count, kFew), std::make_index_sequence<kFew>());
  const AddBlock whole = add_block<BITS, PLANES, true, kTile>;
  const AddBlock rest = add_block_for<BITS, PLANES, true>((count - 1) % kTile + 1, std::make_index_sequence<kTile>());
  std::int64_t block = 0;
  for (std::int64_t group = 0; group < weight.groups; ++group) {
    for (std::int64_t row = 0; row < kPanelRows; ++row) zero[row] = zero_of(weight, panel, group, row);
    const std::int64_t numbers = (panel * weight.groups + group) * kPanelRows;
    for (std::int64_t row = 0; row < kPanelRows; row += 8)
      _mm256_store_ps(scale + row, load_eight(weight.scales, numbers + row,
                                              weight.half_scales ? Real::float16 : Real::float32));
    const std::int64_t end = std::min((group + 1) * weight.group, weight.columns());
    for (std::int64_t begin = group * weight.group; begin < end; begin += kBlockColumns, ++block) {
      const std::int64_t width = std::min(kBlockColumns, end - begin), at = block * problem.tokens + first;
      const std::uint32_t* const words = weight.words + (panel * weight.steps + begin / kColumns) * kPanelRows;
      Block now = {words,
                   space.codes + PLANES * (problem.tokens * begin + first * width),
                   space.steps + at,
                   space.sums + PLANES * at,
                   width,
                   scale,
                   zero};
      if (count <= kFew) {
        few(now, totals);
        continue;
      }
      unpack<BITS>(words, width, pairs);
      now.weights = pairs;
      for (std::int64_t t = 0; t < count; t += kTile) {
        (count - t < kTile ? rest : whole)(now, totals + t * kPanelRows);
        now.codes += kTile * PLANES * width;
        now.steps += kTile;
        now.sums += kTile * PLANES;
      }
    }
  }
}

// Writes the products of one panel, [token][16], to their slice.
QQ_PAIRS void store_panel(const Linear& problem, const Slice& slice, std::int64_t panel, std::int64_t first,
                          std::int64_t count, const float* totals) {
  const std::int64_t feature = (panel - slice.panel) * kPanelRows, rows = std::min(kPanelRows, slice.width - feature);
  const float* const bias = problem.bias == nullptr ? nullptr : problem.bias + panel * kPanelRows;
  for (std::int64_t t = 0; t < count; ++t) {
    const std::int64_t out = (first + t) * slice.width + feature;
    for (std::int64_t row = 0; row < rows; row += 8) {
      __m256 sum = _mm256_loadu_ps(totals + t * kPanelRows + row);
      if (bias != nullptr) sum = _mm256_add_ps(sum, _mm256_loadu_ps(bias + row));
      if (rows - row >= 8) {
        store_eight(slice.out, out + row, sum, problem.dtype);
      } else {
        alignas(32) float part[8];
        _mm256_store_ps(part, sum);
        for (std::int64_t i = 0; i < rows - row; ++i) store_real(slice.out, out + row + i, part[i], problem.dtype);
      }
    }
  }
}

QQ_PAIRS void multiply(const Linear& problem, const std::uint8_t* bytes, std::int64_t first, std::int64_t last) {
  const Workspace space(problem, const_cast<std::uint8_t*>(bytes));
  const bool two = planes_of(problem) == 2;
  const auto multiply_with = problem.weight.bits == 4 ? (two ? multiply_panel<4, 2> : multiply_panel<4, 1>)
                                                      : (two ? multiply_panel<8, 2> : multiply_panel<8, 1>);
  alignas(64) float totals[kTokens * kPanelRows];
  for (std::int64_t token = 0; token < problem.tokens; token += kTokens) {
    const std::int64_t count = std::min(kTokens, problem.tokens - token);
    const Slice* slice = problem.slices;
    for (std::int64_t panel = first; panel < last; ++panel) {
      while (panel >= slice->panel + (slice->width + kPanelRows - 1) / kPanelRows) ++slice;
      multiply_with(problem, space, panel, token, count, totals);
      store_panel(problem, *slice, panel, token, count, totals);
    }
  }
}

}  // namespace

}  // namespace qquant
