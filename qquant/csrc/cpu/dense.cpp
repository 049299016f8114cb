// Products of few activations with a bfloat16 weight in plain C++ and for AVX2, and the choice among all versions.

#include "dense.h"

#include "isa.h"

namespace qquant {

namespace {

void multiply(const Dense& problem, std::int64_t first, std::int64_t last) {
  for (std::int64_t row = first; row < last; ++row) {
    const std::uint16_t* const weight = problem.weight + row * problem.weight_stride;
    for (std::int64_t token = 0; token < problem.tokens; ++token) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < problem.columns; ++k)
        sum += from_bfloat16(weight[k]) * from_bfloat16(problem.x[place_of(problem.tokens, token, k)]);
      store_dense(problem, token, row, sum);
    }
  }
}

#if QQ_X86

constexpr std::int64_t kWide = 16;  // columns per step: eight at even and eight at odd places

QQ_AVX2 QQ_INLINE __m256 even_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

QQ_AVX2 QQ_INLINE __m256 odd_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))));
}

QQ_AVX2 QQ_INLINE float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// One row times TOKENS.
template <int TOKENS>
QQ_AVX2 void multiply_row(const Dense& problem, std::int64_t token, std::int64_t row) {
  const std::uint16_t* const weight = problem.weight + row * problem.weight_stride;
  __m256 even[TOKENS], odd[TOKENS];
  for (int t = 0; t < TOKENS; ++t) even[t] = odd[t] = _mm256_setzero_ps();
  const std::int64_t whole = problem.columns / kWide * kWide;
  for (std::int64_t k = 0; k < whole; k += kWide) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + k));
    const std::uint16_t* const x = problem.x + place_of(problem.tokens, token, k);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t * kDenseLine));
      even[t] = _mm256_fmadd_ps(even_of(w), even_of(v), even[t]);
      odd[t] = _mm256_fmadd_ps(odd_of(w), odd_of(v), odd[t]);
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    float sum = sum_of(_mm256_add_ps(even[t], odd[t]));
    for (std::int64_t k = whole; k < problem.columns; ++k)
      sum += from_bfloat16(weight[k]) * from_bfloat16(problem.x[place_of(problem.tokens, token + t, k)]);
    store_dense(problem, token + t, row, sum);
  }
}

QQ_AVX2 void multiply_avx2(const Dense& problem, std::int64_t first, std::int64_t last) {
  for (std::int64_t row = first; row < last; ++row) {
    std::int64_t token = 0;  // after the first four, the row lies in the cache
    for (; token + 4 <= problem.tokens; token += 4) multiply_row<4>(problem, token, row);
    const std::int64_t left = problem.tokens - token;
    if (left == 1) multiply_row<1>(problem, token, row);
    if (left == 2) multiply_row<2>(problem, token, row);
    if (left == 3) multiply_row<3>(problem, token, row);
  }
}

#endif

}  // namespace

const DenseKernel kDensePortable = multiply;
#if QQ_X86
const DenseKernel kDenseAvx2 = multiply_avx2;
#endif

DenseKernel dense_kernel() {
#if QQ_X86
  if (isa() >= Isa::avx512_bf16) return kDenseAvx512Bf16;
  if (isa() >= Isa::avx512) return kDenseAvx512;
  if (isa() >= Isa::avx2) return kDenseAvx2;
#endif
  return kDensePortable;
}

}  // namespace qquant
