// Quantizing and dequantizing for AVX2 and F16C: the ranges of 8 vectors are chosen side by side.

#include "bfloat16_vectors.h"
#include "isa.h"
#include "kv_codes.h"

#if QQ_X86

#include <algorithm>
#include <cstring>

// A product fused into a sum rounds once where the reference rounds twice.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace qquant {

namespace {

constexpr std::int64_t kWide = 8;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

template <Real DTYPE>
QQ_AVX2 QQ_INLINE __m256 load(const void* data, std::int64_t at) {
  if (DTYPE == Real::float32) return _mm256_loadu_ps(static_cast<const float*>(data) + at);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(data) + at));
  if (DTYPE == Real::float16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <Real DTYPE>
QQ_AVX2 QQ_INLINE void store(void* data, std::int64_t at, __m256 x) {
  if (DTYPE == Real::float32) return _mm256_storeu_ps(static_cast<float*>(data) + at, x);
  __m128i half;
  if (DTYPE == Real::float16) {
    half = _mm256_cvtps_ph(x, kNearest);
  } else {
    half = bfloat16_of(x);
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(data) + at), half);
}

QQ_AVX2 QQ_INLINE float smallest_of(__m256 x) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_shuffle_ps(two, two, 1)));
}

QQ_AVX2 QQ_INLINE float largest_of(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// choose_range of kv_ops.py for 8 vectors: float16 scale and zero.
QQ_AVX2 QQ_INLINE void choose_ranges(__m256 low, __m256 high, __m128i& scale, __m128i& zero) {
  const __m256 share = _mm256_set1_ps(kShare), minus_low = _mm256_xor_ps(low, _mm256_set1_ps(-0.0f));
  const __m256 step = _mm256_sub_ps(_mm256_mul_ps(high, share), _mm256_mul_ps(low, share));
  const __m256 least = _mm256_mul_ps(_mm256_max_ps(high, minus_low), _mm256_set1_ps(kMinRelativeStep));
  const __m256 wanted =
      _mm256_min_ps(_mm256_max_ps(_mm256_max_ps(step, least), _mm256_set1_ps(kMinStep)), _mm256_set1_ps(kMaxStep));
  scale = _mm256_cvtps_ph(wanted, kNearest);
  const __m256i short_of = _mm256_castps_si256(_mm256_cmp_ps(_mm256_cvtph_ps(scale), wanted, _CMP_LT_OQ));
  // All ones is -1, and packing keeps it.
  scale =
      _mm_sub_epi16(scale, _mm_packs_epi32(_mm256_castsi256_si128(short_of), _mm256_extracti128_si256(short_of, 1)));
  const __m256 level = _mm256_div_ps(minus_low, _mm256_cvtph_ps(scale));
  zero = _mm256_cvtps_ph(_mm256_min_ps(_mm256_max_ps(level, _mm256_set1_ps(-kMaxZero)), _mm256_set1_ps(kMaxZero)),
                         kNearest);
}

// Eight codes, in the low half.
QQ_AVX2 QQ_INLINE __m128i codes_of(__m256 x, __m256 inverse, __m256 zero) {
  const __m256 level = _mm256_add_ps(_mm256_mul_ps(x, inverse), zero);
  // Clamped before it is rounded: the ends are integers, so the order does not matter. NaN becomes 0.
  const __m256 clamped = _mm256_min_ps(_mm256_max_ps(level, _mm256_setzero_ps()), _mm256_set1_ps(255.0f));
  const __m256i whole = _mm256_cvtps_epi32(clamped);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  return _mm_packus_epi16(words, words);
}

template <Real DTYPE>
QQ_AVX2 void encode_as(const EncodeRun& run) {
  for (std::int64_t first = 0; first < run.count; first += kWide) {
    const std::int64_t count = std::min(kWide, run.count - first);
    alignas(32) float lows[kWide] = {}, highs[kWide] = {}, inverses[kWide], zeros[kWide];
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = (first + i) * run.stride;
      __m256 low = load<DTYPE>(run.states, at), high = low;
      for (std::int64_t d = kWide; d < run.size; d += kWide) {
        const __m256 x = load<DTYPE>(run.states, at + d);
        low = _mm256_min_ps(low, x);
        high = _mm256_max_ps(high, x);
      }
      lows[i] = smallest_of(low);
      highs[i] = largest_of(high);
    }
    __m128i scale, zero;
    choose_ranges(_mm256_load_ps(lows), _mm256_load_ps(highs), scale, zero);
    std::memcpy(run.scale + first, &scale, std::size_t(count) * 2);
    std::memcpy(run.zero + first, &zero, std::size_t(count) * 2);
    _mm256_store_ps(inverses, _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_cvtph_ps(scale)));
    _mm256_store_ps(zeros, _mm256_cvtph_ps(zero));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = (first + i) * run.stride;
      std::uint8_t* codes = run.codes + (first + i) * run.code_stride;
      const __m256 inverse = _mm256_set1_ps(inverses[i]), offset = _mm256_set1_ps(zeros[i]);
      for (std::int64_t d = 0; d < run.size; d += kWide)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + d),
                         codes_of(load<DTYPE>(run.states, at + d), inverse, offset));
    }
  }
}

template <Real DTYPE>
QQ_AVX2 void decode_as(const DecodeRun& run) {
  for (std::int64_t i = 0; i < run.count; ++i) {
    const __m256 scale = _mm256_set1_ps(_cvtsh_ss(run.scale[i])), zero = _mm256_set1_ps(_cvtsh_ss(run.zero[i]));
    const std::uint8_t* codes = run.codes + i * run.code_stride;
    for (std::int64_t d = 0; d < run.size; d += kWide) {
      const __m128i code = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + d));
      const __m256 level = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(code));
      store<DTYPE>(run.out, i * run.size + d, _mm256_mul_ps(scale, _mm256_sub_ps(level, zero)));
    }
  }
}

void encode(const EncodeRun& run) {
  if (run.size % kWide != 0) return kCodesPortable.encode(run);  // no masks here; no model has such heads
  if (run.dtype == Real::float32) return encode_as<Real::float32>(run);
  return run.dtype == Real::float16 ? encode_as<Real::float16>(run) : encode_as<Real::bfloat16>(run);
}

void decode(const DecodeRun& run) {
  if (run.size % kWide != 0) return kCodesPortable.decode(run);
  if (run.dtype == Real::float32) return decode_as<Real::float32>(run);
  return run.dtype == Real::float16 ? decode_as<Real::float16>(run) : decode_as<Real::bfloat16>(run);
}

}  // namespace

const CodeKernels kCodesAvx2 = {encode, decode};

}  // namespace qquant

#endif
