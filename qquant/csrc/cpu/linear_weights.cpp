// Panels of packed weights unpacked to plain rows, in plain C++, for AVX2 and for AVX-512.

#include "linear_weights.h"

#include <algorithm>

#include "bfloat16_vectors.h"
#include "isa.h"
#include "transpose_avx512.h"

namespace qquant {

namespace {

constexpr std::int64_t kChunkSteps = 64;  // steps turned at a time: 16 rows of them stay in the first-level cache

// Neighbouring columns of one row that share a scale and a zero.
struct Run {
  const std::uint8_t* codes;  // 4 or 8 bits each, lowest bits first; readable up to 64 bytes past the last
  std::int64_t count;         // a multiple of 32 / bits
  float scale, zero;
  void* out;
};

using DecodeRun = void (*)(const Run&);

template <int BITS, Real DTYPE>
void decode_portable(const Run& run) {
  for (std::int64_t k = 0; k < run.count; ++k) {
    const int code = BITS == 8 ? run.codes[k] : run.codes[k / 2] >> (k % 2 * 4) & 15;
    store_real(run.out, k, run.scale * (float(code) - run.zero), DTYPE);
  }
}

#if QQ_X86

template <Real DTYPE>
QQ_AVX2 QQ_INLINE void store_eight(void* out, std::int64_t at, __m256 x) {
  if constexpr (DTYPE == Real::float32)
    _mm256_storeu_ps(static_cast<float*>(out) + at, x);
  else
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(out) + at),
        DTYPE == Real::bfloat16 ? bfloat16_of(x) : _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <int BITS, Real DTYPE>
QQ_AVX2 void decode_avx2(const Run& run) {
  const __m256 scale = _mm256_set1_ps(run.scale), zero = _mm256_set1_ps(run.zero);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  std::int64_t k = 0;
  for (; k + 8 <= run.count; k += 8) {
    __m256i code;
    if constexpr (BITS == 8) {
      code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(run.codes + k)));
    } else {
      int word;
      __builtin_memcpy(&word, run.codes + k / 2, 4);
      code = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), _mm256_set1_epi32(15));
    }
    store_eight<DTYPE>(run.out, k, _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero)));
  }
  if (k < run.count)  // four codes of 8 bits
    decode_portable<BITS, DTYPE>({run.codes + k, run.count - k, run.scale, run.zero,
                                  static_cast<char*>(run.out) + k * bytes_of(DTYPE)});
}

template <Real DTYPE>
QQ_AVX512_PLAIN QQ_INLINE __m256i sixteen_bits_of(__m512 x) {
  return DTYPE == Real::bfloat16 ? bfloat16_of(x)
                                 : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Writes the first `bytes` of a vector. Whole lines go past the caches, which what is unpacked does not fit into.
QQ_AVX512_PLAIN QQ_INLINE void write(char* to, __m512i x, std::int64_t bytes) {
  if (bytes >= 64 && reinterpret_cast<std::uintptr_t>(to) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), x);
  else
    _mm512_mask_storeu_epi8(to, bytes >= 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1, x);
}

QQ_AVX512_PLAIN QQ_INLINE __m512 weights_of(__m128i codes, __m512 scale, __m512 zero) {
  return _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), zero));
}

template <Real DTYPE>
QQ_AVX512_PLAIN void decode_bytes_avx512(const Run& run) {
  const __m512 scale = _mm512_set1_ps(run.scale), zero = _mm512_set1_ps(run.zero);
  char* const to = static_cast<char*>(run.out);
  if constexpr (DTYPE == Real::float32) {
    for (std::int64_t k = 0; k < run.count; k += 16) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run.codes + k));
      write(to + k * 4, _mm512_castps_si512(weights_of(codes, scale, zero)), (run.count - k) * 4);
    }
  } else {
    for (std::int64_t k = 0; k < run.count; k += 32) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run.codes + k));
      const __m256i low = sixteen_bits_of<DTYPE>(weights_of(_mm256_castsi256_si128(codes), scale, zero));
      const __m256i high = sixteen_bits_of<DTYPE>(weights_of(_mm256_extracti128_si256(codes, 1), scale, zero));
      write(to + k * 2, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), (run.count - k) * 2);
    }
  }
}

// A row has only 16 different weights in one group: they are computed once and looked up.
template <Real DTYPE>
QQ_AVX512_PLAIN void decode_nibbles_avx512(const Run& run) {
  const __m512i all = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 table = _mm512_mul_ps(_mm512_set1_ps(run.scale),
                                     _mm512_sub_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(run.zero)));
  char* const to = static_cast<char*>(run.out);
  if constexpr (DTYPE == Real::float32) {
    const __m512i shifts = _mm512_and_si512(_mm512_slli_epi32(all, 2), _mm512_set1_epi32(31));
    const __m512i word = _mm512_srli_epi32(all, 3);
    for (std::int64_t k = 0; k < run.count; k += 16) {
      const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(run.codes + k / 2));
      const __m512i code = _mm512_srlv_epi32(_mm512_permutexvar_epi32(word, _mm512_castsi128_si512(two)), shifts);
      write(to + k * 4, _mm512_castps_si512(_mm512_permutexvar_ps(code, table)), (run.count - k) * 4);
    }
  } else {
    const __m512i table16 = _mm512_broadcast_i64x4(sixteen_bits_of<DTYPE>(table));
    const __m512i shifts = _mm512_set1_epi64(0x000c000800040000);
    const __m512i half = _mm512_setr_epi32(0, 0, 0x10001, 0x10001, 0x20002, 0x20002, 0x30003, 0x30003, 0x40004, 0x40004,
                                           0x50005, 0x50005, 0x60006, 0x60006, 0x70007, 0x70007);
    for (std::int64_t k = 0; k < run.count; k += 32) {
      const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run.codes + k / 2));
      const __m512i code = _mm512_srlv_epi16(_mm512_permutexvar_epi16(half, _mm512_castsi128_si512(four)), shifts);
      write(to + k * 2, _mm512_permutexvar_epi16(code, table16), (run.count - k) * 2);
    }
  }
}

#endif

template <int BITS, Real DTYPE>
DecodeRun decode_of() {
#if QQ_X86
  if (isa() >= Isa::avx512) return BITS == 8 ? decode_bytes_avx512<DTYPE> : decode_nibbles_avx512<DTYPE>;
  if (isa() >= Isa::avx2) return decode_avx2<BITS, DTYPE>;
#endif
  return decode_portable<BITS, DTYPE>;
}

template <int BITS>
DecodeRun decode_of(Real dtype) {
  if (dtype == Real::float32) return decode_of<BITS, Real::float32>();
  return dtype == Real::float16 ? decode_of<BITS, Real::float16>() : decode_of<BITS, Real::bfloat16>();
}

// The words of 16 rows, kChunkSteps of each. Longer than that: a vector of codes may be read past the end of a run.
using Rows = std::uint32_t[kPanelRows][kChunkSteps + 16];

// The words of `count` steps, turned: what was [step][row] is [row][step].
void turn_portable(const std::uint32_t* words, std::int64_t count, Rows& rows) {
  for (std::int64_t row = 0; row < kPanelRows; ++row)
    for (std::int64_t step = 0; step < count; ++step) rows[row][step] = words[step * kPanelRows + row];
}

#if QQ_X86

QQ_AVX512_PLAIN void turn_avx512(const std::uint32_t* words, std::int64_t count, Rows& rows) {
  for (std::int64_t first = 0; first < count; first += 16) {
    __m512i x[16];
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < 16; ++i)  // of steps that do not exist, the last one again: nobody reads them
      x[i] = _mm512_loadu_si512(words + std::min(first + i, count - 1) * kPanelRows);
    transpose(x);
#pragma GCC unroll 16
    for (std::int64_t row = 0; row < kPanelRows; ++row) _mm512_storeu_si512(rows[row] + first, x[row]);
  }
}

#endif

void turn(const std::uint32_t* words, std::int64_t count, Rows& rows) {
#if QQ_X86
  if (isa() >= Isa::avx512) return turn_avx512(words, count, rows);
#endif
  turn_portable(words, count, rows);
}

}  // namespace

void unpack_weights(const Panels& weight, void* out, Real dtype, std::int64_t first_panel, std::int64_t last_panel) {
  const DecodeRun decode = weight.bits == 8 ? decode_of<8>(dtype) : decode_of<4>(dtype);
  const std::int64_t columns = weight.columns(), per = weight.step_columns();
  alignas(64) Rows rows = {};
  for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
    for (std::int64_t step = 0; step < weight.steps; step += kChunkSteps) {
      const std::int64_t count = std::min(kChunkSteps, weight.steps - step);
      const std::int64_t begin = step * per, end = begin + count * per, first_group = begin / weight.group;
      turn(weight.words + (panel * weight.steps + step) * kPanelRows, count, rows);
      for (std::int64_t row = 0; row < kPanelRows; ++row) {
        const auto* const codes = reinterpret_cast<const std::uint8_t*>(rows[row]);
        char* const to = static_cast<char*>(out) + (panel * kPanelRows + row) * columns * bytes_of(dtype);
        for (std::int64_t k = begin, group = first_group; k < end; ++group) {
          const std::int64_t next = std::min(end, (group + 1) * weight.group);
          decode({codes + (k - begin) * weight.bits / 8, next - k, scale_of(weight, panel, group, row),
                  float(zero_of(weight, panel, group, row)), to + k * bytes_of(dtype)});
          k = next;
        }
      }
    }
  }
#if QQ_X86
  _mm_sfence();  // lines that went past the caches become visible to other threads
#endif
}

}  // namespace qquant
