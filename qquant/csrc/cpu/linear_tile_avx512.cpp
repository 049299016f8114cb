// Products of bfloat16 activations with packed weights for many tokens, AVX-512 BF16: a stretch of columns of some
// panels is unpacked to bfloat16 and multiplied by many tokens while it lies in the second-level cache.
//
// A weight is scale * (code - zero) in float32, rounded once to bfloat16; activations are taken as they are. Products
// are summed in float32 by vdpbf16ps, column pair by column pair, each stretch by itself; stretches are added in the
// order of the columns. Where stretches begin depends on the weight alone, and so a result depends neither on the
// number of tokens nor on threads. NaN and infinities of x go where the sums take them. The instructions read denormal
// numbers as zero and flush denormal results: all are below 2^-126.

#include "isa.h"
#include "linear.h"

#if QQ_X86

#include <algorithm>
#include <cstring>

namespace qquant {

namespace {

constexpr std::int64_t kWide = 16;  // 32-bit numbers per vector
constexpr std::int64_t kTilePanels = 2;
constexpr std::int64_t kTileTokens = 12;  // with two panels their sums fill 24 of the 32 registers
constexpr std::int64_t kTileRows = 3;     // tokens whose activations one pointer reaches
constexpr std::int64_t kStretch = 512;    // columns at most
constexpr std::int64_t kBandPanels = 8;   // unpacked together: 128 KiB
// Their sums, 132 KiB: both fit into the second-level cache, beside what streams through it (measured at 1024 tokens:
// twice as many tokens are 1 % slower, four times as many 5 %, although panels are unpacked for fewer runs).
constexpr std::int64_t kHeldTokens = 22 * kTileTokens;
// From one token's activations of a stretch to the next's in the workspace: a line more than they fill, see in_place.
constexpr std::int64_t kRowBytes = 2 * kStretch + 64;

std::int64_t ceil_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// How columns are cut into stretches of one size but the last.
struct Stretches {
  std::int64_t columns, count, size;

  explicit Stretches(const Panels& weight) : columns(weight.columns()) {
    count = std::max<std::int64_t>(1, ceil_of(columns, kStretch));
    size = ceil_of(weight.steps, count) * weight.step_columns();
  }

  std::int64_t begin(std::int64_t index) const { return std::min(index * size, columns); }
  std::int64_t length(std::int64_t index) const { return begin(index + 1) - begin(index); }
};

// Whether tiles read x itself. Its rows must not begin 2 KiB or a multiple apart: the same columns of a tile's tokens
// would share few sets of the first-level cache, each of which holds 8 lines, and evict each other.
bool in_place(const Linear& problem) { return problem.order == nullptr && problem.stride % 1024 != 0; }

// The workspace, where x is not read in place: activations as [stretch][token][kRowBytes].
std::int64_t workspace_bytes(const Linear& problem) {
  return in_place(problem) ? 0 : Stretches(problem.weight).count * problem.tokens * kRowBytes;
}
std::int64_t token_grain(const Linear& problem) {
  return in_place(problem) ? std::max<std::int64_t>(1, problem.tokens) : 1;
}
std::int64_t panel_grain(const Linear&) { return kTilePanels; }

void encode(const Linear& problem, std::int64_t first, std::int64_t last, std::uint8_t* workspace) {
  if (in_place(problem)) return;
  const Stretches stretches(problem.weight);
  const auto* const x = static_cast<const std::uint16_t*>(problem.x);
  for (std::int64_t token = first; token < last; ++token) {
    const std::uint16_t* const from = x + token * problem.stride;
    for (std::int64_t s = 0; s < stretches.count; ++s) {
      auto* const to = reinterpret_cast<std::uint16_t*>(workspace + (s * problem.tokens + token) * kRowBytes);
      const std::int64_t begin = stretches.begin(s), count = stretches.length(s);
      if (problem.order == nullptr) {
        std::memcpy(to, from + begin, std::size_t(2 * count));
        continue;
      }
      for (std::int64_t k = 0; k < count; ++k) {
        const std::int32_t at = problem.order[begin + k];
        to[k] = at < 0 ? std::uint16_t{0} : from[at];
      }
    }
  }
}

// A stretch of a band of panels, unpacked: pairs of columns of two panels side by side.
using Unpacked = std::uint32_t[kBandPanels / kTilePanels][kStretch / 2][kTilePanels][kWide];

// What the words of a group's columns become: rows twice, as a pair of columns has them.
struct Group {
  __m512 scale[2];  // of rows 0-7, and 8-15
  __m512 zero[2];
};

QQ_AVX512_BF16 QQ_INLINE Group group_at(const Panels& weight, std::int64_t panel, std::int64_t group) {
  const std::int64_t at = (panel * weight.groups + group) * kPanelRows;
  __m512 scale;
  if (weight.half_scales)
    scale = _mm512_cvtph_ps(_mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(weight.scales) + at)));
  else
    scale = _mm512_loadu_ps(static_cast<const float*>(weight.scales) + at);
  __m512i zero = _mm512_set1_epi32(weight.zero);
  if (weight.zeros != nullptr)
    zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.zeros + at)));
  const __m512 zeros = _mm512_cvtepi32_ps(zero);
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {{_mm512_permutexvar_ps(low, scale), _mm512_permutexvar_ps(high, scale)},
          {_mm512_permutexvar_ps(low, zeros), _mm512_permutexvar_ps(high, zeros)}};
}

// Words of one panel and group to pairs of weights. ONE_ZERO: all rows have the same.
template <int BITS, bool ONE_ZERO>
QQ_AVX512_BF16 void unpack(const std::uint32_t* words, std::int64_t steps, const Group& group, std::uint32_t* to) {
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i twice[2] = {low, _mm512_add_epi32(low, _mm512_set1_epi32(8))};
  // 4 bits look a number up; 8 bits become the last of 2^23 + code, from which 2^23 + zero is taken exactly.
  __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if constexpr (ONE_ZERO) table = _mm512_sub_ps(table, group.zero[0]);
  const __m512i magic = _mm512_set1_epi32(0x4b000000);
  const __m512 base[2] = {_mm512_add_ps(group.zero[0], _mm512_castsi512_ps(magic)),
                          _mm512_add_ps(group.zero[1], _mm512_castsi512_ps(magic))};
  for (std::int64_t step = 0; step < steps; ++step) {
    const __m512i word = _mm512_loadu_si512(words + step * kPanelRows);
    const __m512i halves[2] = {_mm512_permutexvar_epi32(twice[0], word), _mm512_permutexvar_epi32(twice[1], word)};
#pragma GCC unroll 4
    for (int j = 0; j < 16 / BITS; ++j) {
      __m512 weights[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512 integer;
        if constexpr (BITS == 4) {
          const __m512i shift = _mm512_set1_epi64(std::int64_t(8 * j + 4) << 32 | 8 * j);
          integer = _mm512_permutexvar_ps(_mm512_srlv_epi32(halves[half], shift), table);
          if constexpr (!ONE_ZERO) integer = _mm512_sub_ps(integer, group.zero[half]);
        } else {
          // Of each word twice: one byte of the first, the next of the second.
          const __m128i bytes = _mm_add_epi8(_mm_setr_epi32(0, 5, 8, 13), _mm_set1_epi32(2 * j));
          const __m512i code =
              _mm512_mask_shuffle_epi8(magic, 0x1111111111111111, halves[half], _mm512_broadcast_i32x4(bytes));
          integer = _mm512_sub_ps(_mm512_castsi512_ps(code), base[half]);
        }
        weights[half] = _mm512_mul_ps(integer, group.scale[half]);
      }
      _mm512_store_si512(to + (16 / BITS * step + j) * kTilePanels * kWide,
                         (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]));
    }
  }
}

QQ_AVX512_BF16 void unpack_panel(const Panels& weight, std::int64_t panel, std::int64_t begin, std::int64_t end,
                                 std::uint32_t* to) {
  const int shift = weight.bits == 4 ? 3 : 2;  // columns of a step, as a power of two
  const auto unpack_group = weight.bits == 8           ? unpack<8, false>
                            : weight.zeros != nullptr ? unpack<4, false>
                                                      : unpack<4, true>;
  const std::uint32_t* const words = weight.words + panel * weight.steps * kPanelRows;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t index = at / weight.group, next = std::min(end, (index + 1) * weight.group);
    const Group group = group_at(weight, panel, index);
    unpack_group(words + (at >> shift) * kPanelRows, (next - at) >> shift, group,
                 to + (at - begin) / 2 * kTilePanels * kWide);
    at = next;
  }
}

// A tile's activations times a stretch of one or two panels: what the sums grow by.
struct Product {
  const std::uint8_t* x;  // TOKENS of them, each `row` bytes after the one before
  std::int64_t row;
  const std::uint32_t (*weights)[kTilePanels][kWide];
  std::int64_t pairs;
  float* sums;  // [TOKENS][kBandPanels][16]
  bool first;   // the sums hold nothing yet
  const std::uint8_t* ahead;  // asked for meanwhile, `ahead_step` bytes further for each two pairs
  std::int64_t ahead_step;
};

template <int TOKENS, int PANELS>
QQ_AVX512_BF16 void multiply_tile(const Product& product) {
  const std::int64_t row = product.row;
  constexpr int kPointers = (TOKENS + kTileRows - 1) / kTileRows;
  const std::uint8_t* x[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) x[i] = product.x + i * kTileRows * row;
  const auto* w = product.weights;
  const std::uint8_t* ahead = product.ahead;
  __m512 sum[TOKENS][PANELS];
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
    for (int n = 0; n < PANELS; ++n) sum[t][n] = _mm512_setzero_ps();
  for (std::int64_t pairs = product.pairs; pairs > 0; pairs -= 2) {  // even: a step holds at least two
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    ahead += product.ahead_step;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m512i weight[PANELS];
#pragma GCC unroll 2
      for (int n = 0; n < PANELS; ++n) weight[n] = _mm512_load_si512(w[i][n]);
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; ++t) {
        std::int32_t pair;
        std::memcpy(&pair, x[t / kTileRows] + t % kTileRows * row + 4 * i, sizeof pair);
        const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int n = 0; n < PANELS; ++n) sum[t][n] = _mm512_dpbf16_ps(sum[t][n], (__m512bh)weight[n], (__m512bh)both);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) x[i] += 8;
    w += 2;
  }
  const auto before = __mmask16(product.first ? 0 : 0xffff);
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
    for (int n = 0; n < PANELS; ++n) {
      float* const at = product.sums + (t * kBandPanels + n) * kWide;
      _mm512_store_ps(at, _mm512_add_ps(sum[t][n], _mm512_maskz_load_ps(before, at)));
    }
}

using Multiply = void (*)(const Product&);
template <int PANELS>
constexpr Multiply kMultiply[kTileTokens] = {
    multiply_tile<1, PANELS>, multiply_tile<2, PANELS>,  multiply_tile<3, PANELS>,  multiply_tile<4, PANELS>,
    multiply_tile<5, PANELS>, multiply_tile<6, PANELS>,  multiply_tile<7, PANELS>,  multiply_tile<8, PANELS>,
    multiply_tile<9, PANELS>, multiply_tile<10, PANELS>, multiply_tile<11, PANELS>, multiply_tile<12, PANELS>};

// Writes the sums of a band, with their bias, to the results.
QQ_AVX512_BF16 void store_band(const Linear& problem, std::int64_t panel, std::int64_t panels, const float* sums,
                               std::int64_t first_token, std::int64_t tokens) {
  struct {
    std::uint16_t* out;
    std::int64_t width;
    __mmask16 here;
  } to[kBandPanels];
  alignas(64) float bias[kBandPanels][kWide] = {};
  const Slice* slice = problem.slices;
  for (std::int64_t i = 0; i < panels; ++i) {
    while (panel + i >= slice->panel + ceil_of(slice->width, kPanelRows)) ++slice;
    const std::int64_t feature = (panel + i - slice->panel) * kPanelRows;
    to[i] = {static_cast<std::uint16_t*>(slice->out) + first_token * slice->width + feature, slice->width,
             __mmask16((1u << std::min(kPanelRows, slice->width - feature)) - 1)};
    if (problem.bias != nullptr) std::copy_n(problem.bias + (panel + i) * kPanelRows, kPanelRows, bias[i]);
  }
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t i = 0; i < panels; ++i) {
      const __m512 sum = _mm512_load_ps(sums + (t * kBandPanels + i) * kWide);
      _mm256_mask_storeu_epi16(to[i].out + t * to[i].width, to[i].here,
                               (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sum, _mm512_load_ps(bias[i]))));
    }
}

// Some panels and tokens, whose sums are held at once.
struct Part {
  std::int64_t panel, panels, token, tokens;
};

// What is unpacked next, to be asked for while tiles are multiplied: memory would else be waited for.
struct Next {
  const std::uint32_t* words = nullptr;  // of the first panel
  std::int64_t panels = 0;
};

Next next_of(const Panels& weight, const Stretches& stretches, std::int64_t stretch, const Part& part,
             std::int64_t last_panel) {
  const std::uint32_t* const words = weight.words + part.panel * weight.steps * kPanelRows;
  if (stretch + 1 < stretches.count)
    return {words + stretches.begin(stretch + 1) / weight.step_columns() * kPanelRows, part.panels};
  const std::int64_t left = last_panel - part.panel - part.panels;
  return left > 0 ? Next{words + part.panels * weight.steps * kPanelRows, std::min(kBandPanels, left)} : Next{};
}

// A band of panels times the tokens of a run.
QQ_AVX512_BF16 void multiply_band(const Linear& problem, const std::uint8_t* workspace, const Part& part,
                                  std::int64_t last_panel) {
  alignas(64) Unpacked weights;
  alignas(64) float sums[kHeldTokens * kBandPanels * kWide];
  const Panels& weight = problem.weight;
  const Stretches stretches(weight);
  const bool placed = in_place(problem);
  const std::int64_t row = placed ? 2 * problem.stride : kRowBytes;
  for (std::int64_t s = 0; s < stretches.count; ++s) {
    const std::int64_t begin = stretches.begin(s), pairs = stretches.length(s) / 2;
    for (std::int64_t i = 0; i < part.panels; ++i)
      unpack_panel(weight, part.panel + i, begin, begin + 2 * pairs, weights[i / 2][0][i % 2]);
    const Next next = next_of(weight, stretches, s, part, last_panel);
    std::int64_t asked = 0;  // panels
    const std::uint8_t* x = placed ? static_cast<const std::uint8_t*>(problem.x) + part.token * row + 2 * begin
                                   : workspace + (s * problem.tokens + part.token) * row;
    for (std::int64_t t = 0; t < part.tokens; t += kTileTokens) {
      const std::int64_t count = std::min(kTileTokens, part.tokens - t);
      for (std::int64_t i = 0; i < part.panels; i += kTilePanels) {
        // Every other product asks for words, the rest for the activations of the next tile, if they lie together.
        Product product{x, row, weights[i / 2], pairs, sums + (t * kBandPanels + i) * kWide, s == 0, x, 0};
        if (i / 2 % 2 == 1 && asked < next.panels) {
          product.ahead = reinterpret_cast<const std::uint8_t*>(next.words + asked++ * weight.steps * kPanelRows);
          product.ahead_step = weight.bits * 8;  // a line holds 64 / bits pairs
        } else if (!placed) {
          product.ahead = x + count * row + i / 4 * pairs * 32;
          product.ahead_step = 64;
        }
        (part.panels - i == 1 ? kMultiply<1> : kMultiply<2>)[count - 1](product);
      }
      x += count * row;
    }
  }
  store_band(problem, part.panel, part.panels, sums, part.token, part.tokens);
}

void multiply(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last) {
  const std::int64_t runs = ceil_of(problem.tokens, kHeldTokens);
  if (runs == 0) return;
  const std::int64_t run = ceil_of(ceil_of(problem.tokens, runs), kTileTokens) * kTileTokens;
  // Runs outside, so that all bands find a run's activations in the third-level cache.
  for (std::int64_t token = 0; token < problem.tokens; token += run)
    for (std::int64_t panel = first; panel < last; panel += kBandPanels)
      multiply_band(problem, workspace,
                    {panel, std::min(kBandPanels, last - panel), token, std::min(run, problem.tokens - token)}, last);
}

}  // namespace

const LinearKernels kLinearAvx512Tile = {workspace_bytes, token_grain, encode, panel_grain, multiply};

}  // namespace qquant

#endif
