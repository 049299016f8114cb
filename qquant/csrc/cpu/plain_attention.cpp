// Attention of one token for AVX-512: a KV head's keys are read once for up to seven query heads, then its values.

#include "plain_attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "bfloat16_vectors.h"
#include "isa.h"

namespace qquant {

#if QQ_X86

namespace {

constexpr std::int64_t kWide = 16;  // float32 per vector
constexpr float kLog2E = 1.44269504088896341f;

QQ_AVX512_PLAIN QQ_INLINE __mmask16 lanes(std::int64_t count) {
  return count >= kWide ? __mmask16(0xffff) : __mmask16((1u << (count < 0 ? 0 : count)) - 1u);
}

QQ_AVX512_PLAIN QQ_INLINE __m512 widened(const std::uint16_t* data, __mmask16 here) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, data)), 16));
}

QQ_AVX512_PLAIN QQ_INLINE void store(std::uint16_t* data, __mmask16 here, __m512 x) {
  _mm256_mask_storeu_epi16(data, here, bfloat16_of(x));
}

// 2^x for x <= 0; the series of 2^r for |r| <= 1/2 ends where its next term is below 2^-27.
QQ_AVX512_PLAIN QQ_INLINE __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.52527338e-5f);
  for (const float c :
       {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, whole);  // NaN stays NaN, what is too small becomes 0
}

// Scores of ROWS query heads against every key: weights[row * room + token], in powers of two.
template <int ROWS>
QQ_AVX512_PLAIN void score(const PlainStates& keys, const std::uint16_t* data, std::int64_t tokens, const float* query,
                           std::int64_t padded, float* weights, std::int64_t room) {
  for (std::int64_t t = 0; t < tokens; ++t, data += keys.token) {
    __m512 sums[ROWS];
    for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_setzero_ps();
    for (std::int64_t d = 0; d < keys.size; d += kWide) {
      const __m512 key = widened(data + d, lanes(keys.size - d));
      for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_fmadd_ps(key, _mm512_load_ps(query + r * padded + d), sums[r]);
    }
    for (int r = 0; r < ROWS; ++r) weights[r * room + t] = _mm512_reduce_add_ps(sums[r]);
  }
}

// Softmax of one row of scores in place, but for its sum, which is returned.
QQ_AVX512_PLAIN float exponentiate(float* weights, std::int64_t tokens, const std::uint8_t* mask) {
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 tops = none;
  for (std::int64_t t = 0; t < tokens; t += kWide) {
    const __mmask16 here = lanes(tokens - t);
    __m512 x = _mm512_mask_loadu_ps(none, here, weights + t);
    if (mask != nullptr) {
      const __m128i seen = _mm_maskz_loadu_epi8(here, mask + t);
      x = _mm512_mask_mov_ps(none, _mm_test_epi8_mask(seen, seen), x);
      _mm512_mask_storeu_ps(weights + t, here, x);
    }
    tops = _mm512_max_ps(tops, x);
  }
  const float top = _mm512_reduce_max_ps(tops);
  const __m512 peak = _mm512_set1_ps(top == -std::numeric_limits<float>::infinity() ? 0.0f : top);
  __m512 sums = _mm512_setzero_ps();
  for (std::int64_t t = 0; t < tokens; t += kWide) {
    const __mmask16 here = lanes(tokens - t);
    const __m512 weight = exp2(_mm512_sub_ps(_mm512_mask_loadu_ps(none, here, weights + t), peak));
    _mm512_mask_storeu_ps(weights + t, here, weight);
    sums = _mm512_add_ps(sums, weight);
  }
  return _mm512_reduce_add_ps(sums);
}

// The values, each times its weight: VECTORS vectors of elements at a time for ROWS query heads.
template <int ROWS, int VECTORS>
QQ_AVX512_PLAIN void gather(const PlainStates& values, const std::uint16_t* data, std::int64_t tokens,
                            const float* weights, std::int64_t room, const float* totals, std::uint16_t* out) {
  for (std::int64_t base = 0; base < values.size; base += VECTORS * kWide) {
    __mmask16 here[VECTORS];
    __m512 sums[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      here[v] = lanes(values.size - base - v * kWide);
      for (int r = 0; r < ROWS; ++r) sums[r][v] = _mm512_setzero_ps();
    }
    const std::uint16_t* token = data + base;
    for (std::int64_t t = 0; t < tokens; ++t, token += values.token)
      for (int v = 0; v < VECTORS; ++v) {
        const __m512 value = widened(token + v * kWide, here[v]);
        for (int r = 0; r < ROWS; ++r)
          sums[r][v] = _mm512_fmadd_ps(value, _mm512_set1_ps(weights[r * room + t]), sums[r][v]);
      }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v)
        store(out + r * values.size + base + v * kWide, here[v], _mm512_div_ps(sums[r][v], _mm512_set1_ps(totals[r])));
  }
}

template <int ROWS>
void attend_rows(const PlainAttention& p, std::int64_t sequence, std::int64_t kv_head, std::int64_t head,
                 const float* query, std::int64_t padded, float* weights, std::int64_t room) {
  const std::uint16_t* const keys = p.keys.data + sequence * p.keys.batch + kv_head * p.keys.head;
  const std::uint16_t* const values = p.values.data + sequence * p.values.batch + kv_head * p.values.head;
  score<ROWS>(p.keys, keys, p.tokens, query, padded, weights, room);
  float totals[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const std::uint8_t* const mask =
        p.mask == nullptr ? nullptr : p.mask + sequence * p.mask_batch + (head + r) * p.mask_head;
    const float total = exponentiate(weights + r * room, p.tokens, mask);
    totals[r] = total == 0.0f ? 1.0f : total;
  }
  std::uint16_t* const out = p.out + (sequence * p.kv_heads * p.group + head) * p.values.size;
  // 28 sums at most: there are 32 registers.
  if (ROWS <= 3 && p.values.size > 4 * kWide)
    gather<ROWS, ROWS <= 3 ? 8 : 4>(p.values, values, p.tokens, weights, room, totals, out);
  else
    gather<ROWS, 4>(p.values, values, p.tokens, weights, room, totals, out);
}

using AttendRows = void (*)(const PlainAttention&, std::int64_t, std::int64_t, std::int64_t, const float*, std::int64_t,
                            float*, std::int64_t);
constexpr AttendRows kAttendRows[] = {attend_rows<1>, attend_rows<2>, attend_rows<3>, attend_rows<4>,
                                      attend_rows<5>, attend_rows<6>, attend_rows<7>};
constexpr std::int64_t kMaxRows = 7;

// Queries as float32, scaled, so that scores are exponents of 2; rows end in zeros.
QQ_AVX512_PLAIN void widen_query(const PlainAttention& p, const std::uint16_t* query, std::int64_t rows,
                                 std::int64_t padded, float* out) {
  const __m512 factor = _mm512_set1_ps(p.scaling * kLog2E);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t d = 0; d < padded; d += kWide)
      _mm512_store_ps(out + r * padded + d,
                      _mm512_mul_ps(widened(query + r * p.query_head + d, lanes(p.keys.size - d)), factor));
}

std::int64_t round_up(std::int64_t count) { return (count + kWide - 1) / kWide * kWide; }

}  // namespace

bool plain_attention_is_here() { return isa() >= Isa::avx512; }

void attend_plain(const PlainAttention& p, std::int64_t first, std::int64_t last) {
  const std::int64_t padded = round_up(p.keys.size), room = round_up(p.tokens), rows = std::min(p.group, kMaxRows);
  std::vector<float> space(std::size_t(rows * (padded + room) + kWide));
  // The queries' rows begin at multiples of 64 bytes.
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(space.data());
  float* const query = space.data() + (64 - begin % 64) % 64 / sizeof(float);
  float* const weights = query + rows * padded;
  for (std::int64_t task = first; task < last; ++task) {
    const std::int64_t sequence = task / p.kv_heads, kv_head = task % p.kv_heads;
    for (std::int64_t done = 0; done < p.group; done += kMaxRows) {
      const std::int64_t head = kv_head * p.group + done, count = std::min(kMaxRows, p.group - done);
      widen_query(p, p.query + sequence * p.query_batch + head * p.query_head, count, padded, query);
      kAttendRows[count - 1](p, sequence, kv_head, head, query, padded, weights, room);
    }
  }
}

#else

bool plain_attention_is_here() { return false; }

void attend_plain(const PlainAttention&, std::int64_t, std::int64_t) {}

#endif

}  // namespace qquant
