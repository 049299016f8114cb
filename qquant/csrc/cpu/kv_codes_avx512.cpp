// Quantizing and dequantizing for AVX-512: the ranges of 16 vectors are chosen side by side.

#include "bfloat16_vectors.h"
#include "isa.h"
#include "kv_codes.h"

#if QQ_X86

#include <algorithm>

// A product fused into a sum rounds once where the reference rounds twice.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace qquant {

namespace {

constexpr std::int64_t kWide = 16;

QQ_AVX512 QQ_INLINE __mmask16 lanes(std::int64_t count) {
  return count >= kWide ? __mmask16(0xffff) : __mmask16((1u << count) - 1u);
}

template <Real DTYPE>
QQ_AVX512 QQ_INLINE __m512 load(const void* data, std::int64_t at, __mmask16 here) {
  if (DTYPE == Real::float32) return _mm512_maskz_loadu_ps(here, static_cast<const float*>(data) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(here, static_cast<const std::uint16_t*>(data) + at);
  if (DTYPE == Real::float16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <Real DTYPE>
QQ_AVX512 QQ_INLINE void store(void* data, std::int64_t at, __mmask16 here, __m512 x) {
  if (DTYPE == Real::float32) return _mm512_mask_storeu_ps(static_cast<float*>(data) + at, here, x);
  __m256i half;
  if (DTYPE == Real::float16) {
    half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    half = bfloat16_of(x);
  }
  _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(data) + at, here, half);
}

// choose_range of kv_ops.py for 16 vectors: float16 scale and zero.
QQ_AVX512 QQ_INLINE void choose_ranges(__m512 low, __m512 high, __m256i& scale, __m256i& zero) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 share = _mm512_set1_ps(kShare), minus_low = _mm512_xor_ps(low, _mm512_set1_ps(-0.0f));
  const __m512 step = _mm512_sub_ps(_mm512_mul_ps(high, share), _mm512_mul_ps(low, share));
  const __m512 least = _mm512_mul_ps(_mm512_max_ps(high, minus_low), _mm512_set1_ps(kMinRelativeStep));
  const __m512 wanted =
      _mm512_min_ps(_mm512_max_ps(_mm512_max_ps(step, least), _mm512_set1_ps(kMinStep)), _mm512_set1_ps(kMaxStep));
  scale = _mm512_cvtps_ph(wanted, kNearest);
  const __mmask16 short_of = _mm512_cmp_ps_mask(_mm512_cvtph_ps(scale), wanted, _CMP_LT_OQ);
  scale = _mm256_mask_add_epi16(scale, short_of, scale, _mm256_set1_epi16(1));
  const __m512 level = _mm512_div_ps(minus_low, _mm512_cvtph_ps(scale));
  zero = _mm512_cvtps_ph(_mm512_min_ps(_mm512_max_ps(level, _mm512_set1_ps(-kMaxZero)), _mm512_set1_ps(kMaxZero)),
                         kNearest);
}

template <Real DTYPE>
QQ_AVX512 void encode_as(const EncodeRun& run) {
  const __mmask16 tail = lanes((run.size - 1) % kWide + 1);
  const std::int64_t whole = run.size - ((run.size - 1) % kWide + 1);
  for (std::int64_t first = 0; first < run.count; first += kWide) {
    const std::int64_t count = std::min(kWide, run.count - first);
    alignas(64) float lows[kWide] = {}, highs[kWide] = {}, inverses[kWide], zeros[kWide];
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = (first + i) * run.stride;
      const __m512 last = load<DTYPE>(run.states, at + whole, tail);
      // Lanes past the end repeat the first element.
      __m512 low = _mm512_mask_mov_ps(_mm512_broadcastss_ps(_mm512_castps512_ps128(last)), tail, last), high = low;
      for (std::int64_t d = 0; d < whole; d += kWide) {
        const __m512 x = load<DTYPE>(run.states, at + d, 0xffff);
        low = _mm512_min_ps(low, x);
        high = _mm512_max_ps(high, x);
      }
      lows[i] = _mm512_reduce_min_ps(low);
      highs[i] = _mm512_reduce_max_ps(high);
    }
    __m256i scale, zero;
    choose_ranges(_mm512_load_ps(lows), _mm512_load_ps(highs), scale, zero);
    _mm256_mask_storeu_epi16(run.scale + first, lanes(count), scale);
    _mm256_mask_storeu_epi16(run.zero + first, lanes(count), zero);
    _mm512_store_ps(inverses, _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_cvtph_ps(scale)));
    _mm512_store_ps(zeros, _mm512_cvtph_ps(zero));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = (first + i) * run.stride;
      std::uint8_t* codes = run.codes + (first + i) * run.code_stride;
      const __m512 inverse = _mm512_set1_ps(inverses[i]), offset = _mm512_set1_ps(zeros[i]);
      for (std::int64_t d = 0; d < run.size; d += kWide) {
        const __mmask16 here = d < whole ? __mmask16(0xffff) : tail;
        const __m512 level = _mm512_add_ps(_mm512_mul_ps(load<DTYPE>(run.states, at + d, here), inverse), offset);
        // Clamped before it is rounded: the ends are integers, so the order does not matter. NaN becomes 0.
        const __m512 clamped = _mm512_min_ps(_mm512_max_ps(level, _mm512_setzero_ps()), _mm512_set1_ps(255.0f));
        _mm512_mask_cvtepi32_storeu_epi8(codes + d, here, _mm512_cvtps_epi32(clamped));
      }
    }
  }
}

template <Real DTYPE>
QQ_AVX512 void decode_as(const DecodeRun& run) {
  for (std::int64_t i = 0; i < run.count; ++i) {
    const __m512 scale = _mm512_set1_ps(_cvtsh_ss(run.scale[i])), zero = _mm512_set1_ps(_cvtsh_ss(run.zero[i]));
    const std::uint8_t* codes = run.codes + i * run.code_stride;
    for (std::int64_t d = 0; d < run.size; d += kWide) {
      const __mmask16 here = lanes(run.size - d);
      const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, codes + d));
      store<DTYPE>(run.out, i * run.size + d, here,
                   _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero)));
    }
  }
}

void encode(const EncodeRun& run) {
  if (run.dtype == Real::float32) return encode_as<Real::float32>(run);
  return run.dtype == Real::float16 ? encode_as<Real::float16>(run) : encode_as<Real::bfloat16>(run);
}

void decode(const DecodeRun& run) {
  if (run.dtype == Real::float32) return decode_as<Real::float32>(run);
  return run.dtype == Real::float16 ? decode_as<Real::float16>(run) : decode_as<Real::bfloat16>(run);
}

}  // namespace

const CodeKernels kCodesAvx512 = {encode, decode};

}  // namespace qquant

#endif
