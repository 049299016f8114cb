// Decode attention's arithmetic for AVX2. A fixed-point vector is int16, one after the other: codes are widened to
// int16 in registers and multiplied and added in pairs, which is exact, unlike the byte product that saturates.

#include "isa.h"
#include "kv_attention.h"

#if QQ_X86

#include <algorithm>
#include <cstring>
#include <limits>

namespace qquant {

namespace {

constexpr std::int64_t kWide = 8;    // float32 per vector
constexpr std::int64_t kCodes = 16;  // codes widened at a time

// The first `count` (at most 16) codes, the rest 0.
QQ_AVX2 QQ_INLINE __m128i codes_at(const std::uint8_t* codes, std::int64_t count) {
  if (count >= kCodes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  alignas(16) std::uint8_t some[kCodes] = {};
  std::memcpy(some, codes, std::size_t(count));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(some));
}

QQ_AVX2 QQ_INLINE __m256i numbers_at(const std::int8_t* fixed, std::int64_t index) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(fixed + 2 * index));
}

QQ_AVX2 QQ_INLINE __m256 real_at(const void* data, std::int64_t at, Real dtype) {
  if (dtype == Real::float32) return _mm256_loadu_ps(static_cast<const float*>(data) + at);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(data) + at));
  if (dtype == Real::float16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

QQ_AVX2 QQ_INLINE float largest_of(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

QQ_AVX2 QQ_INLINE float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// Zeros behind the last number up to a whole vector: what is computed there must not be NaN.
QQ_AVX2 void widen(const std::uint16_t* halves, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + kWide <= count; i += kWide) _mm256_storeu_ps(out + i, real_at(halves, i, Real::float16));
  for (; i < count; ++i) out[i] = _cvtsh_ss(halves[i]);
  std::fill(out + count, out + round_up(count, kWide), 0.0f);
}

QQ_AVX2 float load(const void* data, std::int64_t count, Real dtype, float* out) {
  std::int64_t i = 0;
  for (; i + kWide <= count; i += kWide) _mm256_storeu_ps(out + i, real_at(data, i, dtype));
  for (; i < count; ++i) out[i] = load_real(data, i, dtype);
  std::fill(out + count, out + round_up(count, kWide), 0.0f);
  __m256 tops = _mm256_setzero_ps(), poison = _mm256_setzero_ps();
  for (i = 0; i < count; i += kWide) {
    const __m256 x = _mm256_loadu_ps(out + i);
    tops = _mm256_max_ps(tops, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
    poison = _mm256_fmadd_ps(x, _mm256_setzero_ps(), poison);
  }
  return largest_of(tops) + sum_of(poison);
}

QQ_AVX2 void store(const float* data, std::int64_t count, Real dtype, void* out) {
  for (std::int64_t i = 0; i < count; ++i) store_real(out, i, data[i], dtype);
}

QQ_AVX2 std::int32_t to_fixed(const float* x, std::int64_t count, float inverse, std::int8_t* fixed) {
  const std::int64_t padded = round_up(count, kLine);
  __m256i sum = _mm256_setzero_si256();
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (std::int64_t i = 0; i < padded; i += 2 * kWide) {
    __m256i whole[2];
    for (int k = 0; k < 2; ++k) {
      const std::int64_t at = i + k * kWide;
      const __m256i here = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count - at)), lane);
      whole[k] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_maskload_ps(x + at, here), _mm256_set1_ps(inverse)));
      sum = _mm256_add_epi32(sum, whole[k]);
    }
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole[0], whole[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(fixed + 2 * i), both);
  }
  alignas(32) std::int32_t parts[kWide];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
  std::int32_t total = 0;
  for (const std::int32_t part : parts) total += part;
  return total;
}

// Scores of four tokens, at codes[0] to codes[3], against one row.
QQ_AVX2 QQ_INLINE __m128i score_four(const std::int8_t* fixed, const std::uint8_t* const codes[4], std::int64_t size) {
  __m256i sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = _mm256_setzero_si256();
  const std::int64_t whole = size / kCodes * kCodes;
  for (std::int64_t d = 0; d < whole; d += kCodes) {
    const __m256i x = numbers_at(fixed, d);
    for (int i = 0; i < 4; ++i) {
      const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[i] + d));
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_cvtepu8_epi16(code), x));
    }
  }
  if (whole < size)
    for (int i = 0; i < 4; ++i) {
      const __m256i code = _mm256_cvtepu8_epi16(codes_at(codes[i] + whole, size - whole));
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(code, numbers_at(fixed, whole)));
    }
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

QQ_AVX2 void score(const std::int8_t* fixed, std::int64_t rows, const std::uint8_t* codes, std::int64_t stride,
                   std::int64_t tokens, std::int64_t size, std::int32_t* scores, const std::uint8_t*) {
  for (std::int64_t t = 0; t < tokens; t += 4) {
    const std::uint8_t* four[4];
    // Past the end the last token is read again; nobody reads those scores.
    for (int i = 0; i < 4; ++i) four[i] = codes + std::min(t + i, tokens - 1) * stride;
    for (std::int64_t r = 0; r < rows; ++r)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(scores + r * kExact + t),
                       score_four(fixed + r * query_stride(size), four, size));
  }
}

// 2^x for x <= 0 within 3.6 * 2^-24, 0 below 2^-126; minus infinity gives 0 and NaN NaN. The polynomial is that of the
// version for AVX-512.
QQ_AVX2 QQ_INLINE __m256 exp2(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-127.0f), x);
  const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, whole);
  __m256 y = _mm256_fmadd_ps(_mm256_set1_ps(0x1.5c08e6p-10f), f, _mm256_set1_ps(0x1.3d0c52p-7f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0x1.c6b6e4p-5f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0x1.ebf918p-3f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0x1.62e428p-1f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0x1.000002p+0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

// All ones where a row sees token t + lane.
QQ_AVX2 QQ_INLINE __m256 seen_at(const std::uint8_t* seen, std::int64_t t, std::int64_t limit) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i here = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(limit - t)), lane);
  if (seen == nullptr) return _mm256_castsi256_ps(here);
  std::uint64_t flags = 0;
  std::memcpy(&flags, seen + t, std::size_t(std::min(kWide, limit - t)));
  const __m256i shown = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(flags)));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(shown, _mm256_setzero_si256()));
}

QQ_AVX2 void weigh_row(std::int32_t* scores, const ChunkNumbers& n, const std::uint8_t* seen, std::int64_t visible,
                       std::int64_t tokens, Row& row, std::int8_t* fixed) {
  float* const x = reinterpret_cast<float*>(scores);
  const __m256 offset = _mm256_set1_ps(row.offset), step = _mm256_set1_ps(row.step);
  const __m256 hidden = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  __m256 peaks = _mm256_set1_ps(row.peak);
  for (std::int64_t t = 0; t < tokens; t += kWide) {
    const __m256i dot = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores + t));
    const __m256 centred = _mm256_fnmadd_ps(_mm256_load_ps(n.k_zero + t), offset, _mm256_cvtepi32_ps(dot));
    const __m256 score = _mm256_mul_ps(centred, _mm256_mul_ps(_mm256_load_ps(n.k_scale + t), step));
    const __m256 kept = _mm256_blendv_ps(hidden, score, seen_at(seen, t, seen != nullptr ? tokens : visible));
    peaks = _mm256_max_ps(peaks, kept);
    _mm256_storeu_ps(x + t, kept);
  }
  const float peak = largest_of(peaks);
  row.fade = _mm256_cvtss_f32(exp2(_mm256_set1_ps(row.peak - peak)));
  row.peak = peak;

  __m256 totals = _mm256_setzero_ps(), tops = _mm256_setzero_ps();
  for (std::int64_t t = 0; t < tokens; t += kWide) {
    const __m256 weight = exp2(_mm256_sub_ps(_mm256_loadu_ps(x + t), _mm256_set1_ps(peak)));
    totals = _mm256_add_ps(totals, weight);
    const __m256 scaled = _mm256_mul_ps(weight, _mm256_load_ps(n.v_scale + t));
    tops = _mm256_max_ps(tops, scaled);
    _mm256_storeu_ps(x + t, scaled);
  }
  row.total = row.total * row.fade + sum_of(totals);
  const float top = largest_of(tops);
  // Below this a chunk adds nothing that float32 could hold, and the inverse would overflow.
  to_fixed(x, tokens, top > 0x1p-100f ? float(kLargest) / top : 0.0f, fixed);
  row.weight_step = top / float(kLargest);

  __m256 offsets = _mm256_setzero_ps();
  for (std::int64_t t = 0; t < tokens; t += kWide) {
    const __m128i whole = _mm_loadu_si128(reinterpret_cast<const __m128i*>(fixed + 2 * t));
    offsets = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(whole)), _mm256_load_ps(n.v_zero + t), offsets);
  }
  row.weight_offset = sum_of(offsets);
}

QQ_AVX2 void weigh(std::int32_t* scores, const ChunkNumbers& n, const std::uint8_t* const* seen,
                   const std::int64_t* visible, std::int64_t tokens, std::int64_t rows, Row* state,
                   std::int8_t* fixed) {
  for (std::int64_t r = 0; r < rows; ++r)
    weigh_row(scores + r * kExact, n, seen[r], visible[r], tokens, state[r], fixed + r * fixed_bytes(kExact));
}

// ROWS rows' weights of at most kExact tokens against 32 columns, of which `width` exist.
template <int ROWS, bool WHOLE>
QQ_AVX2 void accumulate_block(const std::int8_t* fixed, const Row* state, const std::uint8_t* codes,
                              std::int64_t stride, std::int64_t tokens, std::int64_t width, float* sums,
                              std::int64_t sums_stride) {
  __m256i sum[ROWS][4];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm256_setzero_si256();
  for (std::int64_t t = 0; t < tokens; t += 2) {
    const std::uint8_t* one = codes + t * stride;
    const std::uint8_t* other = t + 1 < tokens ? one + stride : one;  // its weight is 0 where it does not exist
    __m256i column[4];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const std::int64_t d = half * kCodes, left = WHOLE ? kCodes : std::max<std::int64_t>(0, width - d);
      const __m128i a = codes_at(one + (left > 0 ? d : 0), left), b = codes_at(other + (left > 0 ? d : 0), left);
      column[2 * half] = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
      column[2 * half + 1] = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
    }
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
      int pair;
      std::memcpy(&pair, fixed + r * fixed_bytes(kExact) + 2 * t, 4);
      const __m256i weights = _mm256_set1_epi32(pair);
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm256_add_epi32(sum[r][c], _mm256_madd_epi16(column[c], weights));
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < 4; ++c) {
      float* out = sums + r * sums_stride + c * kWide;
      const __m256 centred = _mm256_sub_ps(_mm256_cvtepi32_ps(sum[r][c]), _mm256_set1_ps(state[r].weight_offset));
      const __m256 before = _mm256_mul_ps(_mm256_loadu_ps(out), _mm256_set1_ps(state[r].fade));
      _mm256_storeu_ps(out, _mm256_fmadd_ps(centred, _mm256_set1_ps(state[r].weight_step), before));
    }
}

using AccumulateBlock = void (*)(const std::int8_t*, const Row*, const std::uint8_t*, std::int64_t, std::int64_t,
                                 std::int64_t, float*, std::int64_t);
constexpr AccumulateBlock kAccumulateBlock[2][2] = {{accumulate_block<1, false>, accumulate_block<1, true>},
                                                    {accumulate_block<2, false>, accumulate_block<2, true>}};

QQ_AVX2 void accumulate(const std::int8_t* fixed, const Row* state, std::int64_t rows, const std::uint8_t* codes,
                        std::int64_t stride, std::int64_t tokens, std::int64_t size, float* sums,
                        std::int64_t sums_stride, std::int8_t*, const std::uint8_t*) {
  constexpr std::int64_t kColumns = 2 * kCodes;
  for (std::int64_t t = 0; t < tokens; t += kExact)
    for (std::int64_t first = 0; first < size; first += kColumns)
      for (std::int64_t r = 0; r < rows; r += 2) {
        const std::int64_t block = std::min<std::int64_t>(2, rows - r), width = std::min(kColumns, size - first);
        Row now[2] = {state[r], state[r + block - 1]};
        // Only the first stretch fades what came before the chunk and takes off the chunk's zeros.
        if (t > 0)
          for (Row& row : now) row.fade = 1.0f, row.weight_offset = 0.0f;
        kAccumulateBlock[block - 1][width == kColumns](
            fixed + r * fixed_bytes(kExact) + 2 * t, now, codes + t * stride + first, stride,
            std::min<std::int64_t>(kExact, tokens - t), width, sums + r * sums_stride + first, sums_stride);
      }
}

}  // namespace

const AttentionKernels kAttentionAvx2 = {kChunk, widen, load, store, to_fixed, score, weigh, accumulate};

}  // namespace qquant

#endif
