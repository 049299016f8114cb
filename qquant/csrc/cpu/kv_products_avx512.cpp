// The integer products of decode attention for AVX-512 VNNI, whose dot product takes four unsigned codes times four
// signed bytes. One query row reads the codes as they lie; several rows share codes that are put in order first.

#include "isa.h"
#include "kv_attention.h"
#include "transpose_avx512.h"

#if QQ_X86

#include <algorithm>

namespace qquant {

namespace {

constexpr std::int64_t kWide = 16;  // 32-bit numbers per vector

QQ_AVX512 QQ_INLINE __mmask64 bytes(std::int64_t count) {
  return count >= kLine ? ~__mmask64(0) : (__mmask64(1) << (count < 0 ? 0 : count)) - 1;
}

// Asks for the next line of what will be read next. The compiler may not move other loads past it: it gathers these
// otherwise, and a core has only so many lines on their way at a time.
QQ_AVX512 QQ_INLINE void fetch(const std::uint8_t*& ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
  ahead += kLine;
  asm volatile("" ::: "memory");
}

// Four vectors of 16 int32 to one: each 128-bit lane holds that lane's sums of a, b, c and d.
QQ_AVX512 QQ_INLINE __m512i add_across_four(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// Four of those to the 16 sums, in order.
QQ_AVX512 QQ_INLINE __m512i add_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  const __m512i cd = _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}

// One line of codes; MASKED where the vectors end inside it.
template <bool MASKED>
QQ_AVX512 QQ_INLINE __m512i line_at(const std::uint8_t* codes, __mmask64 here) {
  return MASKED ? _mm512_maskz_loadu_epi8(here, codes) : _mm512_loadu_si512(codes);
}

// Scores of 16 tokens against one query of BLOCKS lines, of which the last may be MASKED. Without FULL only `left`
// tokens exist; the last of them is read again in place of the others, whose scores nobody reads.
template <int BLOCKS, bool MASKED, bool FULL>
QQ_AVX512 QQ_INLINE __m512i score_sixteen(const __m512i hi[BLOCKS], const __m512i lo[BLOCKS], const std::uint8_t* codes,
                                          std::int64_t stride, std::int64_t left, __mmask64 tail) {
  __m512i quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const std::int64_t token = FULL ? 4 * i + j : std::min<std::int64_t>(4 * i + j, left - 1);
      const std::uint8_t* code = codes + token * stride;
      __m512i line[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b)
        line[b] = b + 1 < BLOCKS ? line_at<false>(code + b * kLine, tail) : line_at<MASKED>(code + b * kLine, tail);
      __m512i total = _mm512_setzero_si512();
      for (int b = 0; b < BLOCKS; ++b) total = _mm512_dpbusd_epi32(total, line[b], hi[b]);
      total = _mm512_slli_epi32(total, 8);
      for (int b = 0; b < BLOCKS; ++b) total = _mm512_dpbusd_epi32(total, line[b], lo[b]);
      sum[j] = total;
    }
    quarter[i] = add_across_four(sum[0], sum[1], sum[2], sum[3]);
  }
  return add_lanes(quarter[0], quarter[1], quarter[2], quarter[3]);
}

// Scores of one query, token by token: the query stays in registers.
template <int BLOCKS, bool MASKED>
QQ_AVX512 void score_one(const std::int8_t* fixed, const std::uint8_t* codes, std::int64_t stride, std::int64_t tokens,
                         std::int64_t size, std::int32_t* scores) {
  __m512i hi[BLOCKS], lo[BLOCKS];
  for (int b = 0; b < BLOCKS; ++b) {
    hi[b] = _mm512_loadu_si512(fixed + b * kLine);
    lo[b] = _mm512_loadu_si512(fixed + (BLOCKS + b) * kLine);
  }
  const __mmask64 tail = bytes(size - (BLOCKS - 1) * kLine);
  std::int64_t t = 0;
  for (; t + 16 <= tokens; t += 16)
    _mm512_storeu_si512(scores + t, score_sixteen<BLOCKS, MASKED, true>(hi, lo, codes + t * stride, stride, 16, tail));
  if (t < tokens)
    _mm512_storeu_si512(scores + t,
                        score_sixteen<BLOCKS, MASKED, false>(hi, lo, codes + t * stride, stride, tokens - t, tail));
}

// 64 columns of 16 tokens, turned: vector i holds columns 4i to 4i + 3 of every token. Only `left` tokens exist; the
// last of them stands in for the others, whose products nobody reads.
QQ_AVX512 QQ_INLINE void load_transposed(const std::uint8_t* codes, std::int64_t stride, std::int64_t left,
                                         std::int64_t width, __m512i x[16]) {
  if (left >= 16 && width >= kLine) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(codes + i * stride);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      x[i] = _mm512_maskz_loadu_epi8(bytes(width), codes + std::min<std::int64_t>(i, left - 1) * stride);
  }
  transpose(x);
}

QQ_AVX512 QQ_INLINE __m512i four_of(const std::int8_t* fixed) {
  int four;
  __builtin_memcpy(&four, fixed, 4);
  return _mm512_set1_epi32(four);
}

// Scores of several queries of up to kUsualHead numbers, or of one of any size, 16 tokens at a time. The codes are
// turned in registers: while their products are summed, the processor already turns the next.
template <int ROWS>
QQ_AVX512 void score_rows(const std::int8_t* fixed, const std::uint8_t* codes, std::int64_t stride, std::int64_t tokens,
                          std::int64_t size, std::int32_t* scores, const std::uint8_t* ahead) {
  const std::int64_t padded = round_up(size, kLine);
  for (std::int64_t t = 0; t < tokens; t += 16) {
    __m512i hi[ROWS], lo[ROWS];
    for (int r = 0; r < ROWS; ++r) hi[r] = lo[r] = _mm512_setzero_si512();
    for (std::int64_t d = 0; d < size; d += kLine) {
      __m512i code[16];
      load_transposed(codes + t * stride + d, stride, tokens - t, size - d, code);
      const std::int8_t* const x = fixed + d;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        fetch(ahead);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const std::int8_t* const four = x + r * query_stride(kUsualHead) + 4 * i;
          hi[r] = _mm512_dpbusd_epi32(hi[r], code[i], four_of(four));
          lo[r] = _mm512_dpbusd_epi32(lo[r], code[i], four_of(four + padded));
        }
      }
    }
    for (int r = 0; r < ROWS; ++r)
      _mm512_storeu_si512(scores + r * kExact + t, _mm512_add_epi32(_mm512_slli_epi32(hi[r], 8), lo[r]));
  }
}

using ScoreRows = void (*)(const std::int8_t*, const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t,
                           std::int32_t*, const std::uint8_t*);
constexpr ScoreRows kScoreRows[] = {score_rows<1>, score_rows<2>, score_rows<3>, score_rows<4>,
                                    score_rows<5>, score_rows<6>, score_rows<7>, score_rows<8>};

// Four tokens' codes of 64 columns, interleaved: the 128-bit lanes of vector i hold columns 4i to 4i + 3 of each 16.
// Without FULL only `left` of the tokens exist.
template <bool MASKED, bool FULL>
QQ_AVX512 QQ_INLINE void interleave(const std::uint8_t* codes, std::int64_t stride, std::int64_t left, __mmask64 here,
                                    __m512i out[4]) {
  __m512i token[4];
  for (int i = 0; i < 4; ++i)
    token[i] = FULL ? line_at<MASKED>(codes + i * stride, here)
                    : line_at<true>(codes + (i < left ? i : 0) * stride, i < left ? here : 0);
  const __m512i a = _mm512_unpacklo_epi8(token[0], token[1]), b = _mm512_unpackhi_epi8(token[0], token[1]);
  const __m512i c = _mm512_unpacklo_epi8(token[2], token[3]), d = _mm512_unpackhi_epi8(token[2], token[3]);
  out[0] = _mm512_unpacklo_epi16(a, c);
  out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d);
  out[3] = _mm512_unpackhi_epi16(b, d);
}

// Undoes interleave's order of columns.
QQ_AVX512 QQ_INLINE void order_columns(__m512i x[4]) {
  const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x88), b = _mm512_shuffle_i32x4(x[0], x[1], 0xdd);
  const __m512i c = _mm512_shuffle_i32x4(x[2], x[3], 0x88), d = _mm512_shuffle_i32x4(x[2], x[3], 0xdd);
  x[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  x[1] = _mm512_shuffle_i32x4(b, d, 0x88);
  x[2] = _mm512_shuffle_i32x4(a, c, 0xdd);
  x[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// Adds 16 sums of one row's chunk to what the row has so far.
QQ_AVX512 QQ_INLINE void add_to_row(__m512 found, const Row& row, float* out) {
  const __m512 centred = _mm512_sub_ps(found, _mm512_set1_ps(row.weight_offset));
  const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(out), _mm512_set1_ps(row.fade));
  _mm512_storeu_ps(out, _mm512_fmadd_ps(centred, _mm512_set1_ps(row.weight_step), before));
}

using ScoreOne = void (*)(const std::int8_t*, const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t,
                          std::int32_t*);
constexpr ScoreOne kScoreOne[4][2] = {{score_one<1, false>, score_one<1, true>},
                                      {score_one<2, false>, score_one<2, true>},
                                      {score_one<3, false>, score_one<3, true>},
                                      {score_one<4, false>, score_one<4, true>}};
constexpr std::int64_t kMaxRows = 8;

// Rows of the next block when `left` are to do: as few blocks as possible, and none of them small.
std::int64_t rows_of_block(std::int64_t left) {
  const std::int64_t blocks = (left + kMaxRows - 1) / kMaxRows;
  return (left + blocks - 1) / blocks;
}

// Adds four tokens' codes of BLOCKS * 64 columns, times one row's weights, to the sums of both limbs.
template <int BLOCKS, bool MASKED, bool FULL>
QQ_AVX512 QQ_INLINE void add_four(const std::int8_t* fixed, std::int64_t padded, const std::uint8_t* codes,
                                  std::int64_t stride, std::int64_t left, __mmask64 tail, __m512i hi[BLOCKS][4],
                                  __m512i lo[BLOCKS][4]) {
  int four_hi, four_lo;
  __builtin_memcpy(&four_hi, fixed, 4);
  __builtin_memcpy(&four_lo, fixed + padded, 4);
  const __m512i weights_hi = _mm512_set1_epi32(four_hi), weights_lo = _mm512_set1_epi32(four_lo);
#pragma GCC unroll 2
  for (int b = 0; b < BLOCKS; ++b) {
    __m512i column[4];
    if (b + 1 < BLOCKS)
      interleave<false, FULL>(codes + b * kLine, stride, left, ~__mmask64(0), column);
    else
      interleave<MASKED, FULL>(codes + b * kLine, stride, left, tail, column);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      hi[b][i] = _mm512_dpbusd_epi32(hi[b][i], column[i], weights_hi);
      lo[b][i] = _mm512_dpbusd_epi32(lo[b][i], column[i], weights_lo);
    }
  }
}

// One row's weights against BLOCKS * 64 columns, codes read as they lie.
template <int BLOCKS, bool MASKED>
QQ_AVX512 void accumulate_one(const std::int8_t* fixed, const Row& row, const std::uint8_t* codes, std::int64_t stride,
                              std::int64_t tokens, std::int64_t width, float* sums) {
  const std::int64_t padded = round_up(tokens, kLine);
  const __mmask64 tail = bytes(width - (BLOCKS - 1) * kLine);
  __m512i hi[BLOCKS][4], lo[BLOCKS][4];
  for (int b = 0; b < BLOCKS; ++b)
    for (int i = 0; i < 4; ++i) hi[b][i] = lo[b][i] = _mm512_setzero_si512();
  std::int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    add_four<BLOCKS, MASKED, true>(fixed + t, padded, codes + t * stride, stride, 4, tail, hi, lo);
  if (t < tokens)
    add_four<BLOCKS, MASKED, false>(fixed + t, padded, codes + t * stride, stride, tokens - t, tail, hi, lo);
  for (int b = 0; b < BLOCKS; ++b) {
    order_columns(hi[b]);
    order_columns(lo[b]);
    for (int i = 0; i < 4; ++i) {
      // In float32: over a whole chunk 256 * hi does not fit int32, while hi itself does by far.
      const __m512 low = _mm512_cvtepi32_ps(lo[b][i]);
      add_to_row(_mm512_fmadd_ps(_mm512_cvtepi32_ps(hi[b][i]), _mm512_set1_ps(256.0f), low), row,
                 sums + b * kLine + i * kWide);
    }
  }
}

using AccumulateOne = void (*)(const std::int8_t*, const Row&, const std::uint8_t*, std::int64_t, std::int64_t,
                               std::int64_t, float*);
constexpr AccumulateOne kAccumulateOne[2][2] = {{accumulate_one<1, false>, accumulate_one<1, true>},
                                                {accumulate_one<2, false>, accumulate_one<2, true>}};

// Values of one chunk: up to 64 columns of codes, and the panel that keeps them interleaved once they were read.
struct Values {
  const std::uint8_t* codes;
  std::int64_t stride, tokens, width;
  std::int8_t* panel;
};

// sum[ROWS][4] = W[row] . values, in interleave's order of columns. The first pass over the codes interleaves them and,
// with PACK, keeps them for the others; without it they are in the panel already.
template <int ROWS, bool PACK>
QQ_AVX512 QQ_INLINE void multiply(const std::int8_t* fixed, const Values& v, const std::uint8_t* ahead,
                                  __m512i sum[ROWS][4]) {
  constexpr int kColumns = ROWS > 5 ? 2 : 4;  // at most 20 accumulators: interleaving needs registers too
  const std::int64_t padded = round_up(v.tokens, kLine);
  for (int first = 0; first < 4; first += kColumns) {
    __m512i part[ROWS][kColumns];
    for (auto& row : part)
      for (auto& column : row) column = _mm512_setzero_si512();
    for (int limb = 0; limb < 2; ++limb) {
      if (limb == 1)
        for (auto& row : part)
          for (auto& column : row) column = _mm512_slli_epi32(column, 8);
      const std::int8_t* x = fixed + limb * padded;
      for (std::int64_t t = 0; t < v.tokens; t += 4) {
        __m512i code[4];
        for (int i = 0; PACK && i < kColumns / 2; ++i) fetch(ahead);
        if (PACK && first + limb == 0) {
          const std::uint8_t* from = v.codes + t * v.stride;
          if (v.tokens - t >= 4 && v.width >= kLine)
            interleave<false, true>(from, v.stride, 4, 0, code);
          else
            interleave<true, false>(from, v.stride, v.tokens - t, bytes(v.width), code);
          for (int c = 0; c < 4; ++c) _mm512_store_si512(v.panel + (t + c) * kLine, code[c]);
        } else {
          for (int c = 0; c < kColumns; ++c) code[c] = _mm512_load_si512(v.panel + (t + first + c) * kLine);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const __m512i numbers = four_of(x + r * fixed_bytes(kExact) + t);
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) part[r][c] = _mm512_dpbusd_epi32(part[r][c], code[c], numbers);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < kColumns; ++c) sum[r][first + c] = part[r][c];
  }
}

template <int ROWS, bool PACK>
QQ_AVX512 void accumulate_rows(const std::int8_t* fixed, const Row* state, const Values& values, float* sums,
                               std::int64_t sums_stride, const std::uint8_t* ahead) {
  __m512i sum[ROWS][4];
  multiply<ROWS, PACK>(fixed, values, ahead, sum);
  for (int r = 0; r < ROWS; ++r) {
    order_columns(sum[r]);
    for (int c = 0; c < 4; ++c) add_to_row(_mm512_cvtepi32_ps(sum[r][c]), state[r], sums + r * sums_stride + c * kWide);
  }
}

using AccumulateRows = void (*)(const std::int8_t*, const Row*, const Values&, float*, std::int64_t,
                                const std::uint8_t*);
constexpr AccumulateRows kAccumulateRows[8][2] = {
    {accumulate_rows<1, false>, accumulate_rows<1, true>}, {accumulate_rows<2, false>, accumulate_rows<2, true>},
    {accumulate_rows<3, false>, accumulate_rows<3, true>}, {accumulate_rows<4, false>, accumulate_rows<4, true>},
    {accumulate_rows<5, false>, accumulate_rows<5, true>}, {accumulate_rows<6, false>, accumulate_rows<6, true>},
    {accumulate_rows<7, false>, accumulate_rows<7, true>}, {accumulate_rows<8, false>, accumulate_rows<8, true>}};

}  // namespace

QQ_AVX512 void score_avx512(const std::int8_t* fixed, std::int64_t rows, const std::uint8_t* codes, std::int64_t stride,
                            std::int64_t tokens, std::int64_t size, std::int32_t* scores, const std::uint8_t* ahead) {
  if (rows == 1 && size > 0 && size <= 4 * kLine)
    return kScoreOne[(size - 1) / kLine][size % kLine != 0](fixed, codes, stride, tokens, size, scores);
  for (std::int64_t r = 0, block; r < rows; r += block) {
    block = size <= kUsualHead ? rows_of_block(rows - r) : 1;
    kScoreRows[block - 1](fixed + r * query_stride(size), codes, stride, tokens, size, scores + r * kExact,
                          r == 0 ? ahead : codes);
  }
}

QQ_AVX512 void accumulate_avx512(const std::int8_t* fixed, const Row* state, std::int64_t rows,
                                 const std::uint8_t* codes, std::int64_t stride, std::int64_t tokens, std::int64_t size,
                                 float* sums, std::int64_t sums_stride, std::int8_t* packed,
                                 const std::uint8_t* ahead) {
  const std::int64_t at_once = rows == 1 ? 2 * kLine : kLine;
  for (std::int64_t first = 0; first < size; first += at_once) {
    const std::int64_t width = std::min(at_once, size - first);
    const bool masked = width % kLine != 0;
    if (rows == 1) {
      kAccumulateOne[(width - 1) / kLine][masked](fixed, *state, codes + first, stride, tokens, width, sums + first);
      continue;
    }
    const Values values{codes + first, stride, tokens, width, packed};
    for (std::int64_t r = 0, block; r < rows; r += block) {
      block = rows_of_block(rows - r);
      kAccumulateRows[block - 1][r == 0](fixed + r * fixed_bytes(kExact), state + r, values,
                                         sums + r * sums_stride + first, sums_stride, ahead + first * tokens);
    }
  }
}

}  // namespace qquant

#endif
