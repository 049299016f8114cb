// Products of few activations with a bfloat16 weight for AVX-512, with its bfloat16 dot product and without.

#include "dense.h"
#include "isa.h"

#if QQ_X86

#include <algorithm>

namespace qquant {

namespace {

constexpr std::int64_t kBandRows = 24;       // whose sums are kept while all stretches of columns are gone through
constexpr std::int64_t kStretchLines = 256;  // activations of a stretch, of all tokens: half of the first-level cache

// Sum of a vector's 16 numbers, always in the same order.
QQ_AVX512_PLAIN QQ_INLINE float sum_of(__m512 x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Adds the products of 16 pairs of weights with 16 pairs of activations to 16 sums. vdpbf16ps is written as assembly
// because its intrinsic needs a function with that target: the loops below serve processors without it too.
template <bool BF16>
QQ_AVX512_PLAIN QQ_INLINE __m512 add_products(__m512 sum, __m512i weight, __m512i x) {
  if constexpr (BF16) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  } else {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weight, 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(weight, upper)),
                           _mm512_castsi512_ps(_mm512_and_si512(x, upper)), sum);
  }
}

// A line of weights or activations; MASKED where the columns end inside it.
template <bool MASKED>
QQ_AVX512_PLAIN QQ_INLINE __m512i line_at(const std::uint16_t* at, __mmask32 here) {
  return MASKED ? _mm512_maskz_loadu_epi16(here, at) : _mm512_loadu_si512(at);
}

template <bool BF16, int TOKENS, int ROWS, bool MASKED>
QQ_AVX512_PLAIN QQ_INLINE void add_line(const std::uint16_t* weight, std::int64_t stride, const std::uint16_t* x,
                                        __mmask32 here, __m512 (&sum)[ROWS][TOKENS]) {
  __m512i w[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) w[r] = line_at<MASKED>(weight + r * stride, here);
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) {
    const __m512i v = line_at<MASKED>(x + t * kDenseLine, here);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sum[r][t] = add_products<BF16>(sum[r][t], w[r], v);
  }
}

// Some columns of ROWS rows times all TOKENS: sums, [ROWS][TOKENS], grow by it. `ahead` is what will be read next: each
// line of weights asks for one line there. One token reads memory from end to end, which the processor foresees itself.
template <bool BF16, int TOKENS, int ROWS>
QQ_AVX512_PLAIN QQ_INLINE void add_rows(const std::uint16_t* weight, std::int64_t stride, const std::uint16_t* x,
                                        std::int64_t columns, const char*& ahead, __m512* sums) {
  __m512 sum[ROWS][TOKENS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sum[r][t] = sums[r * TOKENS + t];
  std::int64_t k = 0;
  for (; k + kDenseLine <= columns; k += kDenseLine) {
#pragma GCC unroll 8
    for (int r = 0; TOKENS > 1 && r < ROWS; ++r, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    add_line<BF16, TOKENS, ROWS, false>(weight + k, stride, x + k * TOKENS, 0, sum);
  }
  if (k < columns) {
    const __mmask32 here = (__mmask32(1) << (columns - k)) - 1;
    add_line<BF16, TOKENS, ROWS, true>(weight + k, stride, x + k * TOKENS, here, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sums[r * TOKENS + t] = sum[r][t];
}

// Rows of the weight band by band, and a band's columns stretch by stretch, whose activations stay in the cache.
template <bool BF16, int TOKENS, int ROWS>
QQ_AVX512_PLAIN void multiply_tokens(const Dense& problem, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kStretch = kStretchLines / TOKENS * kDenseLine;
  const std::int64_t stride = problem.weight_stride;
  for (std::int64_t band = first; band < last; band += kBandRows) {
    const std::int64_t rows = std::min(kBandRows, last - band);
    const std::uint16_t* const weight = problem.weight + band * stride;
    const char* ahead = reinterpret_cast<const char*>(weight) + rows * stride * 2;
    __m512 sums[kBandRows * TOKENS];
    for (std::int64_t i = 0; i < rows * TOKENS; ++i) sums[i] = _mm512_setzero_ps();
    for (std::int64_t k = 0; k < problem.columns; k += kStretch) {
      const std::int64_t columns = std::min(kStretch, problem.columns - k);
      const std::uint16_t* const x = problem.x + k * TOKENS;
      std::int64_t r = 0;
      for (; r + ROWS <= rows; r += ROWS)
        add_rows<BF16, TOKENS, ROWS>(weight + r * stride + k, stride, x, columns, ahead, sums + r * TOKENS);
      for (; r < rows; ++r)
        add_rows<BF16, TOKENS, 1>(weight + r * stride + k, stride, x, columns, ahead, sums + r * TOKENS);
    }
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t t = 0; t < TOKENS; ++t) store_dense(problem, t, band + r, sum_of(sums[r * TOKENS + t]));
  }
}

template <bool BF16>
void multiply(const Dense& problem, std::int64_t first, std::int64_t last) {
  // From five tokens on, two rows share each load of an activation: loads are what takes longest then.
  constexpr DenseKernel kByTokens[kDenseTokens] = {
      multiply_tokens<BF16, 1, 1>, multiply_tokens<BF16, 2, 1>, multiply_tokens<BF16, 3, 1>,
      multiply_tokens<BF16, 4, 1>, multiply_tokens<BF16, 5, 2>, multiply_tokens<BF16, 6, 2>,
      multiply_tokens<BF16, 7, 2>, multiply_tokens<BF16, 8, 2>};
  kByTokens[problem.tokens - 1](problem, first, last);
}

}  // namespace

const DenseKernel kDenseAvx512 = multiply<false>;
const DenseKernel kDenseAvx512Bf16 = multiply<true>;

}  // namespace qquant

#endif
