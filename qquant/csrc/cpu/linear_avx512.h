// What the AVX-512 VNNI kernels of a Linear share: how activations lie in the workspace, the walk over blocks, and how
// 16 sums become 16 results. The kernels are in linear_avx512_few.cpp and linear_avx512_many.cpp, encode in
// linear_avx512_encode.cpp.
//
// Activations. A code of 16 bits is two digits, high * 256 + low, each a signed byte; one of 24 bits is three. The dot
// product takes four unsigned bytes of each of 16 rows and four digits of one token, so a block of `width` columns
// needs width / 4 vectors of weights. Vector v holds columns 4 v to 4 v + 3; of 4-bit codes, where a word holds 8
// columns and unpacking leaves every second one side by side, vector 2 s holds the even columns of step s and vector
// 2 s + 1 the odd ones. Tokens stand in rounds, whose digits should stay in the second-level cache while they meet all
// panels, and in these in tiles:
//   digits[round][block][tile][digit, highest first][vector][token of the tile][4]
// Beside them are, by plane, the steps [plane][block][token] and what corrects for the zeros, [plane][block][token].
// A plane is what one 32-bit sum can hold: both digits of 16 bits, the upper two of 24, the last of 24.

#pragma once

#include "bfloat16_vectors.h"
#include "isa.h"
#include "linear.h"

#if QQ_X86

namespace qquant {

constexpr std::int64_t kFewTokens = 8;    // up to here codes are unpacked in registers, where they are multiplied
constexpr std::int64_t kTileTokens = 12;  // times 2 panels: 24 of the 32 registers hold sums
constexpr std::int64_t kRoundTokens = 96;

struct DigitLayout {
  std::int64_t tokens, columns, blocks, digits, planes, tile, round;

  explicit DigitLayout(const Linear& problem)
      : tokens(problem.tokens),
        columns(problem.weight.columns()),
        blocks(problem.weight.blocks()),
        digits(problem.activation_bits / 8),
        planes(digits == 3 ? 2 : 1) {
    const std::int64_t tiles = tokens <= kFewTokens ? 1 : (tokens + kTileTokens - 1) / kTileTokens;
    tile = std::max<std::int64_t>(1, (tokens + tiles - 1) / tiles);  // tiles as even as can be
    round = kRoundTokens / tile * tile;
  }

  static std::int64_t lines(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }
  std::int64_t steps_at() const { return lines(columns * tokens * digits); }
  std::int64_t corrections_at() const { return steps_at() + lines(4 * planes * blocks * tokens); }
  std::int64_t bytes() const { return corrections_at() + lines(4 * planes * blocks * tokens); }

  // Digits of a tile that begins at token `first`, of a block of `width` columns that begins at `begin`.
  std::int64_t digits_at(std::int64_t begin, std::int64_t width, std::int64_t first) const {
    const std::int64_t round_first = first / round * round, of_round = std::min(round, tokens - round_first);
    return (round_first * columns + begin * of_round + (first - round_first) * width) * digits;
  }
  std::int64_t number_at(std::int64_t plane, std::int64_t block, std::int64_t token) const {
    return (plane * blocks + block) * tokens + token;
  }
};

// The blocks of a weight in the order of their columns, without a division for each.
struct BlockWalk {
  std::int64_t columns, group_size, index = 0, group = 0, begin = 0, end, group_end;

  explicit BlockWalk(const Panels& weight)
      : columns(weight.columns()), group_size(weight.group), group_end(std::min(group_size, columns)) {
    end = std::min(kBlockColumns, group_end);
  }
  bool more() const { return begin < columns; }
  std::int64_t width() const { return end - begin; }
  void next() {
    ++index;
    begin = end;
    if (begin == group_end) {
      ++group;
      group_end = std::min(group_end + group_size, columns);
    }
    end = std::min(begin + kBlockColumns, group_end);
  }
};

void encode_avx512(const Linear& problem, std::int64_t first, std::int64_t last, std::uint8_t* workspace);
void multiply_few_avx512(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last);
void multiply_many_avx512(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last);

QQ_AVX512 QQ_INLINE __m512i four_at(const std::int8_t* digits) {
  std::int32_t four;
  __builtin_memcpy(&four, digits, 4);
  return _mm512_set1_epi32(four);
}

// Scales of the 16 rows of a panel in a group.
QQ_AVX512 QQ_INLINE __m512 scales_at(const Panels& weight, std::int64_t panel, std::int64_t group) {
  const std::int64_t at = (panel * weight.groups + group) * kPanelRows;
  if (!weight.half_scales) return _mm512_loadu_ps(static_cast<const float*>(weight.scales) + at);
  const auto* const halves = static_cast<const std::uint16_t*>(weight.scales) + at;
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}

// Their zeros, where each row has its own.
QQ_AVX512 QQ_INLINE __m512i zeros_at(const Panels& weight, std::int64_t panel, std::int64_t group) {
  const std::uint8_t* const bytes = weight.zeros + (panel * weight.groups + group) * kPanelRows;
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// One more block of 16 results: the one place where float32 rounds, so that every number of tokens rounds alike.
QQ_AVX512 QQ_INLINE __m512 add_block(__m512 total, __m512i sum, __m512 scale, float step) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(step)), total);
}

// Where the results of one panel go.
struct PanelOut {
  char* out;            // of token 0
  std::int64_t stride;  // bytes from token to token
  __mmask16 rows;
  Real dtype;
  const float* bias;    // of the panel, or null
};

// The slice of a panel is searched from `slice` on, which is moved there.
inline PanelOut panel_out(const Linear& problem, std::int64_t panel, const Slice*& slice) {
  while (panel >= slice->panel + (slice->width + kPanelRows - 1) / kPanelRows) ++slice;
  const std::int64_t feature = (panel - slice->panel) * kPanelRows, bytes = bytes_of(problem.dtype);
  const std::int64_t rows = std::min(kPanelRows, slice->width - feature);
  return {static_cast<char*>(slice->out) + feature * bytes, slice->width * bytes, __mmask16((1u << rows) - 1),
          problem.dtype, problem.bias == nullptr ? nullptr : problem.bias + panel * kPanelRows};
}

QQ_AVX512 QQ_INLINE void store_results(const PanelOut& to, std::int64_t token, __m512 total) {
  if (to.bias != nullptr) total = _mm512_add_ps(total, _mm512_loadu_ps(to.bias));
  char* const place = to.out + token * to.stride;
  if (to.dtype == Real::float32)
    _mm512_mask_storeu_ps(place, to.rows, total);
  else if (to.dtype == Real::float16)
    _mm256_mask_storeu_epi16(place, to.rows, _mm512_cvtps_ph(total, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  else
    _mm256_mask_storeu_epi16(place, to.rows, bfloat16_of(total));
}

}  // namespace qquant

#endif
