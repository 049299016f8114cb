// Products of more than 8 tokens with packed weights, AVX-512 VNNI: an integer matrix product. A block of columns of
// two panels is unpacked once for a round of tokens (codes of 8 bits are read as they lie) and stays in the first-level
// cache, as results do over all blocks; sums of 12 tokens times 2 panels stay in registers.

#include "linear_avx512.h"

#if QQ_X86

#include <cstring>

namespace qquant {

namespace {

constexpr std::int64_t kPairPanels = 2;
constexpr std::int64_t kVectorsOfBlock = kBlockColumns / 4;
constexpr std::int64_t kVectorBytes = 64;

// One block of one tile of tokens.
struct Tile {
  const std::uint8_t* codes;  // of panel p: [vector][64] from codes + p * panel_codes on
  std::int64_t panel_codes, vectors;
  const std::int8_t* digits;
  std::int64_t digit_count, plane_stride;
  const float* steps;               // of the tile's first token in the first plane
  const std::int32_t* corrections;  // likewise
  __m512 scale[kPairPanels];
  __m512i zero[kPairPanels];
  bool zeros;     // each row its own
  float* totals;  // [token][panel][16]
  const char* ahead;  // words to ask for in passing: of panel p from ahead + p * panel_words on
  std::int64_t panel_words, ahead_step;
};

template <int TOKENS, int PANELS>
QQ_AVX512 QQ_INLINE void add_products(__m512i sum[TOKENS][PANELS], const Tile& tile, const std::int8_t* digits,
                                      const char* ahead, std::int64_t ahead_step) {
  const std::uint8_t* codes = tile.codes;
  for (std::int64_t v = 0; v < tile.vectors; ++v) {
    __m512i code[PANELS];
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      code[p] = _mm512_loadu_si512(codes + p * tile.panel_codes);
      _mm_prefetch(ahead + p * tile.panel_words, _MM_HINT_T0);
    }
#pragma GCC unroll 12
    for (int t = 0; t < TOKENS; ++t) {
      const __m512i digit = four_at(digits + t * 4);
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) sum[t][p] = _mm512_dpbusd_epi32(sum[t][p], code[p], digit);
    }
    codes += kVectorBytes;
    digits += TOKENS * 4;
    ahead += ahead_step;
  }
}

template <int TOKENS, int PANELS>
QQ_AVX512 void multiply_tile(const Tile& tile) {
  const std::int8_t* digits = tile.digits;
  const float* steps = tile.steps;
  const std::int32_t* corrections = tile.corrections;
  __m512i sum[TOKENS][PANELS];
#pragma GCC unroll 12
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) sum[t][p] = _mm512_setzero_si512();
  for (std::int64_t digit = 0; digit < tile.digit_count; ++digit) {
    add_products<TOKENS, PANELS>(sum, tile, digits, tile.ahead, digit == 0 ? tile.ahead_step : 0);
    digits += tile.vectors * TOKENS * 4;
    if (digit == 0 && tile.digit_count > 1) {  // a second digit joins the first; a third has sums of its own
#pragma GCC unroll 12
      for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) sum[t][p] = _mm512_slli_epi32(sum[t][p], 8);
      continue;
    }
    if (tile.zeros) {
#pragma GCC unroll 12
      for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p)
          sum[t][p] =
              _mm512_add_epi32(sum[t][p], _mm512_mullo_epi32(_mm512_set1_epi32(corrections[t]), tile.zero[p]));
    } else {
#pragma GCC unroll 12
      for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) sum[t][p] = _mm512_add_epi32(sum[t][p], _mm512_set1_epi32(corrections[t]));
    }
#pragma GCC unroll 12
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        float* const total = tile.totals + (t * PANELS + p) * kPanelRows;
        _mm512_store_ps(total, add_block(_mm512_load_ps(total), sum[t][p], tile.scale[p], steps[t]));
        sum[t][p] = _mm512_setzero_si512();
      }
    steps += tile.plane_stride;
    corrections += tile.plane_stride;
  }
}

// Words of one block of a panel, 8 codes of 4 bits each, to bytes.
QQ_AVX512 void unpack(const std::uint32_t* words, std::int64_t steps, std::uint8_t* to) {
  const __m512i low_half = _mm512_set1_epi8(15);
  for (std::int64_t step = 0; step < steps; ++step, words += kPanelRows, to += 2 * kVectorBytes) {
    const __m512i word = _mm512_loadu_si512(words);
    _mm512_store_si512(to, _mm512_and_si512(word, low_half));
    _mm512_store_si512(to + kVectorBytes, _mm512_and_si512(_mm512_srli_epi32(word, 4), low_half));
  }
}

using MultiplyTile = void (*)(const Tile&);

template <int PANELS>
MultiplyTile tile_of(std::int64_t tokens) {
  static constexpr MultiplyTile kByTokens[] = {
      multiply_tile<1, PANELS>, multiply_tile<2, PANELS>,  multiply_tile<3, PANELS>,  multiply_tile<4, PANELS>,
      multiply_tile<5, PANELS>, multiply_tile<6, PANELS>,  multiply_tile<7, PANELS>,  multiply_tile<8, PANELS>,
      multiply_tile<9, PANELS>, multiply_tile<10, PANELS>, multiply_tile<11, PANELS>, multiply_tile<12, PANELS>};
  static_assert(sizeof kByTokens / sizeof kByTokens[0] == kTileTokens, "one for each size of a tile");
  return kByTokens[tokens - 1];
}

// PANELS panels times the tokens of one round.
template <int PANELS>
QQ_AVX512 void multiply_round(const Linear& problem, const DigitLayout& layout, const std::uint8_t* workspace,
                              std::int64_t panel, std::int64_t first, std::int64_t last, const Slice*& slice) {
  constexpr std::int64_t kScratch = kVectorsOfBlock * kVectorBytes;  // of a panel
  alignas(64) std::uint8_t codes[PANELS * kScratch];
  alignas(64) float totals[kRoundTokens * PANELS * kPanelRows];
  std::memset(totals, 0, std::size_t((last - first) * PANELS * kPanelRows) * sizeof(float));
  const Panels& weight = problem.weight;
  const std::int64_t panel_words = weight.steps * kPanelRows, per = weight.step_columns();
  const std::uint32_t* const words = weight.words + panel * panel_words;
  const std::int64_t later = PANELS * panel_words;  // where the panels after these begin
  Tile tile;
  tile.codes = codes;
  tile.panel_codes = kScratch;
  tile.digit_count = layout.digits;
  tile.plane_stride = layout.blocks * layout.tokens;
  tile.zeros = weight.zeros != nullptr;
  tile.panel_words = panel_words * 4;
  for (BlockWalk block(weight); block.more(); block.next()) {
    const std::uint32_t* const from = words + block.begin / per * kPanelRows;
    if (weight.bits == 8) {  // a word is a vector's part as it is
      tile.codes = reinterpret_cast<const std::uint8_t*>(from);
      tile.panel_codes = panel_words * 4;
    }
    for (int p = 0; p < PANELS; ++p) {
      if (weight.bits == 4) unpack(from + p * panel_words, block.width() / per, codes + p * kScratch);
      tile.scale[p] = scales_at(weight, panel + p, block.group);
      if (tile.zeros) tile.zero[p] = zeros_at(weight, panel + p, block.group);
    }
    tile.vectors = block.width() / 4;
    const std::int64_t next = block.end < layout.columns ? block.end / per * kPanelRows : later;
    tile.ahead = reinterpret_cast<const char*>(words + next);
    tile.ahead_step = kVectorBytes * weight.bits / 8;
    for (std::int64_t token = first; token < last; token += layout.tile) {
      const std::int64_t number = layout.number_at(0, block.index, token);
      tile.digits = reinterpret_cast<const std::int8_t*>(workspace) +
                    layout.digits_at(block.begin, block.width(), token);
      tile.steps = reinterpret_cast<const float*>(workspace + layout.steps_at()) + number;
      tile.corrections = reinterpret_cast<const std::int32_t*>(workspace + layout.corrections_at()) + number;
      tile.totals = totals + (token - first) * PANELS * kPanelRows;
      tile_of<PANELS>(std::min(layout.tile, layout.tokens - token))(tile);
      tile.ahead_step = 0;  // asked for once
    }
  }
  for (int p = 0; p < PANELS; ++p) {
    const PanelOut to = panel_out(problem, panel + p, slice);
    for (std::int64_t token = first; token < last; ++token)
      store_results(to, token, _mm512_load_ps(totals + ((token - first) * PANELS + p) * kPanelRows));
  }
}

}  // namespace

void multiply_many_avx512(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last) {
  const DigitLayout layout(problem);
  for (std::int64_t token = 0; token < layout.tokens; token += layout.round) {
    const std::int64_t end = std::min(token + layout.round, layout.tokens);
    const Slice* slice = problem.slices;
    std::int64_t panel = first;
    for (; panel + kPairPanels <= last; panel += kPairPanels)
      multiply_round<kPairPanels>(problem, layout, workspace, panel, token, end, slice);
    if (panel < last) multiply_round<1>(problem, layout, workspace, panel, token, end, slice);
  }
}

}  // namespace qquant

#endif
