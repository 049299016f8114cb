// Activations written as fixed point for the AVX-512 VNNI kernels: steps, digits in the order of linear_avx512.h, and
// what corrects for the zeros.

#include <cstring>

#include "linear_avx512.h"

#if QQ_X86

namespace qquant {

namespace {

constexpr std::int64_t kUnit = 64;  // columns that are encoded at a time, to one vector of digits

QQ_AVX512 QQ_INLINE __mmask32 first_of(std::int64_t count) {
  return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << (count < 0 ? 0 : count)) - 1;
}

// A unit as float32. Of bfloat16, vectors 0 and 2 hold the even columns of one half, 1 and 3 the odd ones: so they lie
// in memory. Of others they are in order.
template <Real DTYPE>
QQ_AVX512 QQ_INLINE void load_unit(const void* values, std::int64_t at, std::int64_t left, __m512 to[4]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const std::int64_t begin = at + 32 * half;
    const __mmask32 here = first_of(left - 32 * half);
    if (DTYPE == Real::float32) {
      const float* const from = static_cast<const float*>(values) + begin;
      to[2 * half] = _mm512_maskz_loadu_ps(__mmask16(here), from);
      to[2 * half + 1] = _mm512_maskz_loadu_ps(__mmask16(here >> 16), from + 16);
    } else {
      const __m512i bits = _mm512_maskz_loadu_epi16(here, static_cast<const std::uint16_t*>(values) + begin);
      if (DTYPE == Real::float16) {
        to[2 * half] = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
        to[2 * half + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
      } else {
        to[2 * half] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        to[2 * half + 1] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(std::int32_t(0xffff0000))));
      }
    }
  }
}

// Digits of one block of one token, [digit, highest first][128], and its other numbers.
struct Encoded {
  alignas(64) std::int8_t digits[3][kBlockColumns];
  float step;
  std::int32_t sum[2];  // by plane
};

// A unit's digits from 16-bit numbers as the packing of load_unit's vectors leaves them, to their order: within 8
// columns the even ones first where EVEN_FIRST, as 4-bit codes are unpacked.
template <Real DTYPE, bool EVEN_FIRST>
QQ_AVX512 QQ_INLINE void store_digits(std::int8_t* to, __m512i first, __m512i second) {
  __m512i bytes = _mm512_packs_epi16(first, second);  // in each 128 bits, four bytes of each of load_unit's vectors
  if (DTYPE == Real::bfloat16) {
    bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), bytes);
    if (!EVEN_FIRST)
      bytes = _mm512_shuffle_epi8(
          bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)));
  } else {
    bytes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
    if (EVEN_FIRST)
      bytes = _mm512_shuffle_epi8(
          bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)));
  }
  _mm512_store_si512(to, bytes);
}

// The lower digit of 16-bit numbers, and what is above it.
QQ_AVX512 QQ_INLINE __m512i low_digit(__m512i numbers) {
  return _mm512_srai_epi16(_mm512_slli_epi16(numbers, 8), 8);
}
QQ_AVX512 QQ_INLINE __m512i high_digit(__m512i numbers) {
  return _mm512_srai_epi16(_mm512_add_epi16(numbers, _mm512_set1_epi16(128)), 8);
}

template <Real DTYPE>
QQ_AVX512 float peak_of(const void* values, std::int64_t width) {
  __m512i peak = _mm512_setzero_si512();
  for (std::int64_t at = 0; at < width; at += kUnit) {
    __m512 value[4];
    load_unit<DTYPE>(values, at, width - at, value);
    // As integers: the order of magnitudes, with infinity and NaN above all.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      peak = _mm512_max_epu32(peak, _mm512_and_si512(_mm512_castps_si512(value[i]), _mm512_set1_epi32(0x7fffffff)));
  }
  return float_of(_mm512_reduce_max_epu32(peak));
}

template <Real DTYPE, int DIGITS, bool EVEN_FIRST>
QQ_AVX512 void encode_block(const void* values, std::int64_t width, Encoded& to) {
  const __mmask16 any = to.step > 0.0f ? 0xffff : 0;
  // A power of two divides as exactly as its inverse multiplies; the step of 8 bits is none.
  const __m512 scale = _mm512_set1_ps(DIGITS == 1 ? to.step : 1.0f / to.step);
  const std::int64_t most = DIGITS == 1 ? kLimit8 : DIGITS == 2 ? kLimit16 : kLimit24;
  const __m512i limit = _mm512_set1_epi32(int(most)), least = _mm512_set1_epi32(int(-most));
  const __m512i ones = _mm512_set1_epi16(1);
  __m512i sum = _mm512_setzero_si512(), last_sum = sum;
  for (std::int64_t at = 0; at < width; at += kUnit) {
    __m512 value[4];
    load_unit<DTYPE>(values, at, width - at, value);
    __m512i code[4], last[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 real = DIGITS == 1 ? _mm512_div_ps(value[i], scale) : _mm512_mul_ps(value[i], scale);
      code[i] = _mm512_maskz_cvtps_epi32(any, real);
      code[i] = _mm512_max_epi32(_mm512_min_epi32(code[i], limit), least);
      if (DIGITS == 3) {
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(code[i], _mm512_set1_epi32(128)), 8);
        last[i] = _mm512_sub_epi32(code[i], _mm512_slli_epi32(upper, 8));
        code[i] = upper;
      }
    }
    const __m512i first = _mm512_packs_epi32(code[0], code[1]), second = _mm512_packs_epi32(code[2], code[3]);
    sum = _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_madd_epi16(first, ones), _mm512_madd_epi16(second, ones)));
    if (DIGITS == 1) {
      store_digits<DTYPE, EVEN_FIRST>(to.digits[0] + at, first, second);
    } else {
      store_digits<DTYPE, EVEN_FIRST>(to.digits[0] + at, high_digit(first), high_digit(second));
      store_digits<DTYPE, EVEN_FIRST>(to.digits[1] + at, low_digit(first), low_digit(second));
    }
    if (DIGITS == 3) {
      const __m512i third = _mm512_packs_epi32(last[0], last[1]), fourth = _mm512_packs_epi32(last[2], last[3]);
      last_sum = _mm512_add_epi32(
          last_sum, _mm512_add_epi32(_mm512_madd_epi16(third, ones), _mm512_madd_epi16(fourth, ones)));
      store_digits<DTYPE, EVEN_FIRST>(to.digits[2] + at, third, fourth);
    }
  }
  to.sum[0] = _mm512_reduce_add_epi32(sum);
  if (DIGITS == 3) to.sum[1] = _mm512_reduce_add_epi32(last_sum);
}

using EncodeBlock = void (*)(const void* values, std::int64_t width, Encoded& to);

template <Real DTYPE>
EncodeBlock encoder_of(std::int64_t digits, bool even_first) {
  if (even_first)
    return digits == 1   ? encode_block<DTYPE, 1, true>
           : digits == 2 ? encode_block<DTYPE, 2, true>
                         : encode_block<DTYPE, 3, true>;
  return digits == 1   ? encode_block<DTYPE, 1, false>
         : digits == 2 ? encode_block<DTYPE, 2, false>
                       : encode_block<DTYPE, 3, false>;
}

// One digit of the block of `count` tokens to [vector][token][4]: four tokens and four vectors at a time are turned.
QQ_AVX512 void interleave(const Encoded* from, std::int64_t digit, std::int64_t width, std::int64_t count,
                          std::int8_t* to) {
  if (count == 1) {
    std::memcpy(to, from->digits[digit], std::size_t(width));
    return;
  }
  for (std::int64_t token = 0; token < count; token += 4) {
    const __mmask8 here = __mmask8((1u << std::min<std::int64_t>(4, count - token)) - 1);
    const __m128i* row[4];
    for (std::int64_t i = 0; i < 4; ++i)
      row[i] = reinterpret_cast<const __m128i*>(from[std::min(token + i, count - 1)].digits[digit]);
    std::int8_t* place = to + token * 4;
    const std::int64_t stride = count * 4;
    for (std::int64_t at = 0; at < (width + 15) / 16; ++at, place += 4 * stride) {
      const __m128i a = _mm_load_si128(row[0] + at), b = _mm_load_si128(row[1] + at);
      const __m128i c = _mm_load_si128(row[2] + at), d = _mm_load_si128(row[3] + at);
      const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
      const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
      const std::int64_t left = width - 16 * at;  // a block ends after any vector
      _mm_mask_storeu_epi32(place, here, _mm_unpacklo_epi64(ab, cd));
      if (left > 4) _mm_mask_storeu_epi32(place + stride, here, _mm_unpackhi_epi64(ab, cd));
      if (left > 8) _mm_mask_storeu_epi32(place + 2 * stride, here, _mm_unpacklo_epi64(ab2, cd2));
      if (left > 12) _mm_mask_storeu_epi32(place + 3 * stride, here, _mm_unpackhi_epi64(ab2, cd2));
    }
  }
}

// The values of a block where `order` puts them.
void gather(const Linear& problem, std::int64_t token, const BlockWalk& block, void* to) {
  const std::int32_t* const from = problem.order + block.begin;
  const std::int64_t width = block.width();
  if (problem.dtype == Real::float32) {
    const float* const row = static_cast<const float*>(problem.x) + token * problem.stride;
    for (std::int64_t i = 0; i < width; ++i) static_cast<float*>(to)[i] = from[i] < 0 ? 0.0f : row[from[i]];
  } else {
    const auto* const row = static_cast<const std::uint16_t*>(problem.x) + token * problem.stride;
    for (std::int64_t i = 0; i < width; ++i)
      static_cast<std::uint16_t*>(to)[i] = from[i] < 0 ? std::uint16_t(0) : row[from[i]];
  }
}

}  // namespace

void encode_avx512(const Linear& problem, std::int64_t first, std::int64_t last, std::uint8_t* workspace) {
  const DigitLayout layout(problem);
  auto* const digits = reinterpret_cast<std::int8_t*>(workspace);
  auto* const steps = reinterpret_cast<float*>(workspace + layout.steps_at());
  auto* const corrections = reinterpret_cast<std::int32_t*>(workspace + layout.corrections_at());
  const bool even_first = problem.weight.bits == 4;
  const Real dtype = problem.dtype;
  const EncodeBlock encode = dtype == Real::float32   ? encoder_of<Real::float32>(layout.digits, even_first)
                             : dtype == Real::float16 ? encoder_of<Real::float16>(layout.digits, even_first)
                                                      : encoder_of<Real::bfloat16>(layout.digits, even_first);
  const auto peak = dtype == Real::float32   ? peak_of<Real::float32>
                    : dtype == Real::float16 ? peak_of<Real::float16>
                                             : peak_of<Real::bfloat16>;
  const std::int32_t zero = problem.weight.zeros == nullptr ? problem.weight.zero : 1;
  Encoded encoded[kTileTokens];
  const void* values[kTileTokens];
  alignas(64) float gathered[kTileTokens][kBlockColumns];
  for (std::int64_t tile = first; tile < last; tile += layout.tile) {
    const std::int64_t count = std::min(layout.tile, layout.tokens - tile);
    for (BlockWalk block(problem.weight); block.more(); block.next()) {
      for (std::int64_t i = 0; i < count; ++i) {
        if (problem.order != nullptr) {
          gather(problem, tile + i, block, gathered[i]);
          values[i] = gathered[i];
        } else {
          const std::int64_t at = (tile + i) * problem.stride + block.begin;
          values[i] = static_cast<const char*>(problem.x) + at * bytes_of(dtype);
        }
        encoded[i].step = step_of(peak(values[i], block.width()), problem.activation_bits);
      }
      for (std::int64_t i = 0; i < count; ++i) {
        encode(values[i], block.width(), encoded[i]);
        for (std::int64_t plane = 0; plane < layout.planes; ++plane) {
          const std::int64_t at = layout.number_at(plane, block.index, tile + i);
          steps[at] = plane + 1 < layout.planes ? encoded[i].step * 256.0f : encoded[i].step;
          corrections[at] = -zero * encoded[i].sum[plane];
        }
      }
      std::int8_t* to = digits + layout.digits_at(block.begin, block.width(), tile);
      for (std::int64_t digit = 0; digit < layout.digits; ++digit, to += block.width() * count)
        interleave(encoded, digit, block.width(), count, to);
    }
  }
}

}  // namespace qquant

#endif
