// Decode attention's arithmetic for AVX-512: conversions and softmax; its products are in kv_products_avx512.cpp.
//
// A fixed-point vector X is two arrays of int8, hi and lo with X = 256 * hi + lo: two dot products of bytes give its
// exact product with the codes.

#include "bfloat16_vectors.h"
#include "isa.h"
#include "kv_attention.h"

#if QQ_X86

#include <algorithm>
#include <limits>

namespace qquant {

namespace {

constexpr std::int64_t kWide = 16;  // float32 per vector

QQ_AVX512 QQ_INLINE __mmask16 lanes(std::int64_t count) {
  return count >= kWide ? __mmask16(0xffff) : __mmask16((1u << (count < 0 ? 0 : count)) - 1u);
}

QQ_AVX512 void widen(const std::uint16_t* halves, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < round_up(count, kLine); i += kWide)
    _mm512_store_ps(out + i, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count - i), halves + i)));
}

QQ_AVX512 float load(const void* data, std::int64_t count, Real dtype, float* out) {
  __m512 tops = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < count; i += kWide) {
    const __mmask16 here = lanes(count - i);
    __m512 x;
    if (dtype == Real::float32) {
      x = _mm512_maskz_loadu_ps(here, static_cast<const float*>(data) + i);
    } else {
      const __m256i half = _mm256_maskz_loadu_epi16(here, static_cast<const std::uint16_t*>(data) + i);
      x = dtype == Real::float16 ? _mm512_cvtph_ps(half)
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    tops = _mm512_max_ps(tops, _mm512_abs_ps(x));
    poison = _mm512_fmadd_ps(x, _mm512_setzero_ps(), poison);
    _mm512_mask_storeu_ps(out + i, here, x);
  }
  return _mm512_reduce_max_ps(tops) + _mm512_reduce_add_ps(poison);
}

QQ_AVX512 void store(const float* data, std::int64_t count, Real dtype, void* out) {
  for (std::int64_t i = 0; i < count; i += kWide) {
    const __mmask16 here = lanes(count - i);
    const __m512 x = _mm512_maskz_loadu_ps(here, data + i);
    if (dtype == Real::float32) {
      _mm512_mask_storeu_ps(static_cast<float*>(out) + i, here, x);
      continue;
    }
    __m256i half;
    if (dtype == Real::float16) {
      half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      half = bfloat16_of(x);
    }
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(out) + i, here, half);
  }
}

// Writes 16 numbers of a fixed-point vector, the low halves of x; hi and lo lie `padded` bytes apart.
QQ_AVX512 QQ_INLINE void store_fixed(__m512i x, std::int8_t* fixed, std::int64_t padded) {
  const __m256i both = _mm512_cvtepi32_epi16(x);
  const __m256i hi = _mm256_srai_epi16(_mm256_add_epi16(both, _mm256_set1_epi16(128)), 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(fixed), _mm256_cvtepi16_epi8(hi));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(fixed + padded), _mm256_cvtepi16_epi8(both));  // x - 256 hi: its low byte
}

QQ_AVX512 std::int32_t to_fixed(const float* x, std::int64_t count, float inverse, std::int8_t* fixed) {
  const std::int64_t padded = round_up(count, kLine);
  __m512i sum = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < padded; i += kWide) {
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(count - i), x + i), _mm512_set1_ps(inverse));
    const __m512i whole = _mm512_cvtps_epi32(value);
    sum = _mm512_add_epi32(sum, whole);
    store_fixed(whole, fixed + i, padded);
  }
  return _mm512_reduce_add_epi32(sum);
}

// Added to a number below 2^22, it leaves the nearest integer in the low bits.
constexpr float kRounder = 0x1.8p23f;

// 2^x for x <= 0 within 3.6 * 2^-24, but 0 below -125; NaN gives NaN. Minimax polynomial of 2^f, |f| <= 1/2.
QQ_AVX512 QQ_INLINE __m512 exp2(__m512 x) {
  const __m512 shifted = _mm512_add_ps(x, _mm512_set1_ps(kRounder));
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, _mm512_set1_ps(kRounder)));
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0x1.5c08e6p-10f), f, _mm512_set1_ps(0x1.3d0c52p-7f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.c6b6e4p-5f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.ebf918p-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.62e428p-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.000002p+0f));
  // The integer goes to the exponent by addition: faster than vscalefps.
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  const __mmask16 large = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(large, _mm512_castps_si512(y), exponent));
}

QQ_AVX512 QQ_INLINE float exp2_of(float x) { return _mm512_cvtss_f32(exp2(_mm512_set1_ps(x))); }

QQ_AVX512 QQ_INLINE __m512 score_at(const std::int32_t* scores, const ChunkNumbers& n, std::int64_t t, const Row& row) {
  const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(scores + t));
  const __m512 centred = _mm512_fnmadd_ps(_mm512_load_ps(n.k_zero + t), _mm512_set1_ps(row.offset), dot);
  return _mm512_mul_ps(centred, _mm512_mul_ps(_mm512_load_ps(n.k_scale + t), _mm512_set1_ps(row.step)));
}

// Scores from products, in place, minus infinity where hidden and up to a multiple of kLine; sets peak and fade.
QQ_AVX512 QQ_INLINE void scale_scores(std::int32_t* scores, const ChunkNumbers& n, const std::uint8_t* seen,
                                      std::int64_t visible, std::int64_t tokens, Row& row) {
  float* const x = reinterpret_cast<float*>(scores);
  __m512 peaks = _mm512_set1_ps(row.peak);
  std::int64_t t = 0;
  for (; seen == nullptr && t + kWide <= visible; t += kWide) {
    const __m512 score = score_at(scores, n, t, row);
    peaks = _mm512_max_ps(peaks, score);
    _mm512_store_ps(x + t, score);
  }
  for (; t < round_up(tokens, kLine); t += kWide) {
    __mmask16 here = lanes((seen != nullptr ? tokens : visible) - t);
    if (seen != nullptr) {
      const __m128i flags = _mm_maskz_loadu_epi8(here, seen + t);
      here = _mm_test_epi8_mask(flags, flags);
    }
    const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __m512 score = _mm512_mask_mov_ps(hidden, here, score_at(scores, n, t, row));
    peaks = _mm512_max_ps(peaks, score);
    _mm512_store_ps(x + t, score);
  }
  const float peak = _mm512_reduce_max_ps(peaks);
  row.fade = exp2_of(row.peak - peak);
  row.peak = peak;
}

// Weights times v_scale from scores, in place; sets total and weight_step.
QQ_AVX512 QQ_INLINE void exponentiate(float* x, const ChunkNumbers& n, std::int64_t padded, Row& row) {
  __m512 totals = _mm512_setzero_ps(), tops = _mm512_setzero_ps();
  for (std::int64_t t = 0; t < padded; t += kWide) {
    const __m512 weight = exp2(_mm512_sub_ps(_mm512_load_ps(x + t), _mm512_set1_ps(row.peak)));
    totals = _mm512_add_ps(totals, weight);
    const __m512 scaled = _mm512_mul_ps(weight, _mm512_load_ps(n.v_scale + t));
    tops = _mm512_max_ps(tops, scaled);
    _mm512_store_ps(x + t, scaled);
  }
  row.total = row.total * row.fade + _mm512_reduce_add_ps(totals);
  row.weight_step = _mm512_reduce_max_ps(tops) / float(kLargest);
}

// Those to fixed point; sets weight_offset.
QQ_AVX512 QQ_INLINE void round_weights(const float* x, const ChunkNumbers& n, std::int64_t padded, Row& row,
                                       std::int8_t* fixed) {
  // Below this a chunk adds nothing that float32 could hold, and the inverse would overflow.
  const __m512 inverse = _mm512_set1_ps(row.weight_step > 0x1p-115f ? 1.0f / row.weight_step : 0.0f);
  const __m512 rounder = _mm512_set1_ps(kRounder);
  __m512 offsets = _mm512_setzero_ps();
  for (std::int64_t t = 0; t < padded; t += kWide) {
    const __m512 shifted = _mm512_fmadd_ps(_mm512_load_ps(x + t), inverse, rounder);
    offsets = _mm512_fmadd_ps(_mm512_sub_ps(shifted, rounder), _mm512_load_ps(n.v_zero + t), offsets);
    store_fixed(_mm512_castps_si512(shifted), fixed + t, padded);
  }
  row.weight_offset = _mm512_reduce_add_ps(offsets);
}

// Step by step for all rows, so that one row's horizontal sums and divisions hide behind the next row's vectors.
QQ_AVX512 void weigh(std::int32_t* scores, const ChunkNumbers& n, const std::uint8_t* const* seen,
                     const std::int64_t* visible, std::int64_t tokens, std::int64_t rows, Row* state,
                     std::int8_t* fixed) {
  const std::int64_t padded = round_up(tokens, kLine);
  float* const x = reinterpret_cast<float*>(scores);
  for (std::int64_t r = 0; r < rows; ++r) scale_scores(scores + r * kExact, n, seen[r], visible[r], tokens, state[r]);
  for (std::int64_t r = 0; r < rows; ++r) exponentiate(x + r * kExact, n, padded, state[r]);
  for (std::int64_t r = 0; r < rows; ++r)
    round_weights(x + r * kExact, n, padded, state[r], fixed + r * fixed_bytes(kExact));
}

}  // namespace

const AttentionKernels kAttentionAvx512 = {kChunk,   widen,        load,  store,
                                           to_fixed, score_avx512, weigh, accumulate_avx512};

}  // namespace qquant

#endif
