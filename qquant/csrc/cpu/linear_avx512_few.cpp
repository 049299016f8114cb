// Products of 1 to 8 tokens with packed weights, AVX-512 VNNI: codes are unpacked in registers and every word is read
// once, in the order it lies in, so that memory is the limit of one token or two and the dot products that of more.

#include "linear_avx512.h"

#if QQ_X86

namespace qquant {

namespace {

// How far ahead of their use words are asked for. The processor's own prefetching stops at the end of a page; with
// this, one stream of words arrives as fast as memory gives it (measured: 2 KiB are 5 % slower, several streams 20 %).
constexpr std::int64_t kAheadBytes = 4096;
// One line per block from further ahead, for the address of its page: where pages are small, finding it takes longer
// than reading it (measured with pages of 4 KiB: 10 to 20 % faster; with 2 MiB no difference).
constexpr std::int64_t kPageAheadBytes = 16384;

// One panel. Loops over digits, chains and tokens are unrolled: what they index has to be registers.
template <int BITS, int DIGITS, int TOKENS>
QQ_AVX512 void multiply_panel(const Linear& problem, const DigitLayout& layout, const std::uint8_t* workspace,
                              std::int64_t panel, const PanelOut& to) {
  constexpr int kPer = 32 / BITS, kVectors = 8 / BITS;  // columns and vectors of a word
  // A dot product waits for the one before it on the same sum: of few tokens each vector of a word has its own.
  constexpr int kChains = TOKENS <= 2 ? kVectors : 1;
  const Panels& weight = problem.weight;
  const auto* word = reinterpret_cast<const char*>(weight.words + panel * weight.steps * kPanelRows);
  const auto* digits = reinterpret_cast<const std::int8_t*>(workspace);
  const auto* steps = reinterpret_cast<const float*>(workspace + layout.steps_at());
  const auto* corrections = reinterpret_cast<const std::int32_t*>(workspace + layout.corrections_at());
  const std::int64_t plane = layout.blocks * TOKENS;
  const __m512i low_half = _mm512_set1_epi8(15);

  __m512 total[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) total[t] = _mm512_setzero_ps();

  for (BlockWalk block(weight); block.more(); block.next(), steps += TOKENS, corrections += TOKENS) {
    const std::int64_t width = block.width(), digit_bytes = width * TOKENS;
    __m512i sum[DIGITS][kChains][TOKENS];
#pragma GCC unroll 3
    for (int d = 0; d < DIGITS; ++d)
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) sum[d][c][t] = _mm512_setzero_si512();
    for (std::int64_t step = 0; step < width / kPer; ++step) {
      __m512i codes[kVectors];
      codes[0] = _mm512_loadu_si512(word);
      _mm_prefetch(word + kAheadBytes, _MM_HINT_T0);
      if (BITS == 4) {
        codes[kVectors - 1] = _mm512_and_si512(_mm512_srli_epi32(codes[0], 4), low_half);
        codes[0] = _mm512_and_si512(codes[0], low_half);
      }
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d)
#pragma GCC unroll 8
          for (int t = 0; t < TOKENS; ++t)
            sum[d][v % kChains][t] = _mm512_dpbusd_epi32(sum[d][v % kChains][t], codes[v],
                                                         four_at(digits + d * digit_bytes + (v * TOKENS + t) * 4));
      word += kPanelRows * 4;
      digits += kVectors * TOKENS * 4;
    }
    digits += (DIGITS - 1) * digit_bytes;
    _mm_prefetch(word + kPageAheadBytes, _MM_HINT_T1);
    const __m512 scale = scales_at(weight, panel, block.group);
    const __m512i zero = weight.zeros == nullptr ? _mm512_set1_epi32(1) : zeros_at(weight, panel, block.group);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      __m512i whole[DIGITS];
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; ++d)
        whole[d] = kChains == 1 ? sum[d][0][t] : _mm512_add_epi32(sum[d][0][t], sum[d][kChains - 1][t]);
      __m512i first = _mm512_mullo_epi32(zero, _mm512_set1_epi32(corrections[t]));
      first = _mm512_add_epi32(first, whole[DIGITS > 1 ? 1 : 0]);
      if (DIGITS > 1) first = _mm512_add_epi32(first, _mm512_slli_epi32(whole[0], 8));
      total[t] = add_block(total[t], first, scale, steps[t]);
      if (DIGITS == 3) {
        const __m512i correction = _mm512_mullo_epi32(zero, _mm512_set1_epi32(corrections[plane + t]));
        total[t] = add_block(total[t], _mm512_add_epi32(whole[DIGITS - 1], correction), scale, steps[plane + t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) store_results(to, t, total[t]);
}

template <int BITS, int DIGITS, int TOKENS>
void multiply_range(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last) {
  const DigitLayout layout(problem);
  const Slice* slice = problem.slices;
  for (std::int64_t panel = first; panel < last; ++panel)
    multiply_panel<BITS, DIGITS, TOKENS>(problem, layout, workspace, panel, panel_out(problem, panel, slice));
}

template <int BITS, int DIGITS>
void multiply_tokens(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last) {
  static constexpr void (*kByTokens[])(const Linear&, const std::uint8_t*, std::int64_t, std::int64_t) = {
      multiply_range<BITS, DIGITS, 1>, multiply_range<BITS, DIGITS, 2>, multiply_range<BITS, DIGITS, 3>,
      multiply_range<BITS, DIGITS, 4>, multiply_range<BITS, DIGITS, 5>, multiply_range<BITS, DIGITS, 6>,
      multiply_range<BITS, DIGITS, 7>, multiply_range<BITS, DIGITS, 8>};
  static_assert(sizeof kByTokens / sizeof kByTokens[0] == kFewTokens, "one for each number of tokens");
  kByTokens[problem.tokens - 1](problem, workspace, first, last);
}

template <int BITS>
void multiply_digits(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last) {
  (problem.activation_bits == 8    ? multiply_tokens<BITS, 1>
   : problem.activation_bits == 16 ? multiply_tokens<BITS, 2>
                                   : multiply_tokens<BITS, 3>)(problem, workspace, first, last);
}

}  // namespace

void multiply_few_avx512(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last) {
  (problem.weight.bits == 4 ? multiply_digits<4> : multiply_digits<8>)(problem, workspace, first, last);
}

}  // namespace qquant

#endif
