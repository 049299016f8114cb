// Decode attention's arithmetic in plain C++: the version for processors that no other file here is written for.
//
// A fixed-point vector is int16, one after the other.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kv_attention.h"

namespace qquant {

namespace {

void widen(const std::uint16_t* halves, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = from_half(halves[i]);
}

float load(const void* data, std::int64_t count, Real dtype, float* out) {
  float top = 0.0f, poison = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = load_real(data, i, dtype);
    top = std::max(top, std::fabs(out[i]));
    poison += out[i] * 0.0f;
  }
  return top + poison;
}

void store(const float* data, std::int64_t count, Real dtype, void* out) {
  for (std::int64_t i = 0; i < count; ++i) store_real(out, i, data[i], dtype);
}

std::int16_t* numbers_of(std::int8_t* fixed) { return reinterpret_cast<std::int16_t*>(fixed); }
const std::int16_t* numbers_of(const std::int8_t* fixed) { return reinterpret_cast<const std::int16_t*>(fixed); }

std::int32_t to_fixed(const float* x, std::int64_t count, float inverse, std::int8_t* fixed) {
  std::int16_t* out = numbers_of(fixed);
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = std::nearbyint(x[i] * inverse);
    out[i] = std::fabs(value) <= float(kLargest) ? std::int16_t(value) : std::int16_t(0);  // NaN: the row is poisoned
    sum += out[i];
  }
  std::fill(out + count, out + round_up(count, kLine), std::int16_t(0));
  return sum;
}

void score(const std::int8_t* fixed, std::int64_t rows, const std::uint8_t* codes, std::int64_t stride,
           std::int64_t tokens, std::int64_t size, std::int32_t* scores, const std::uint8_t*) {
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int16_t* x = numbers_of(fixed + r * query_stride(size));
      const std::uint8_t* code = codes + t * stride;
      std::int32_t sum = 0;
      for (std::int64_t d = 0; d < size; ++d) sum += std::int32_t(x[d]) * std::int32_t(code[d]);
      scores[r * kExact + t] = sum;
    }
}

void weigh_row(std::int32_t* scores, const ChunkNumbers& n, const std::uint8_t* seen, std::int64_t visible,
               std::int64_t tokens, Row& row, std::int8_t* fixed) {
  alignas(kLine) float weights[kExact];
  float peak = row.peak;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const bool hidden = seen != nullptr ? seen[t] == 0 : t >= visible;
    weights[t] = hidden ? -std::numeric_limits<float>::infinity()
                        : (float(scores[t]) - n.k_zero[t] * row.offset) * (n.k_scale[t] * row.step);
    peak = std::max(peak, weights[t]);
  }
  row.fade = std::exp2(row.peak - peak);
  row.peak = peak;
  float total = 0.0f, top = 0.0f;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float weight = std::exp2(weights[t] - peak);
    total += weight;
    weights[t] = weight * n.v_scale[t];
    top = std::max(top, weights[t]);
  }
  row.total = row.total * row.fade + total;
  // Below this a chunk adds nothing that float32 could hold, and the inverse would overflow.
  const float inverse = top > 0x1p-100f ? float(kLargest) / top : 0.0f;
  row.weight_step = top / float(kLargest);
  to_fixed(weights, tokens, inverse, fixed);
  row.weight_offset = 0.0f;
  for (std::int64_t t = 0; t < tokens; ++t) row.weight_offset += float(numbers_of(fixed)[t]) * n.v_zero[t];
}

void weigh(std::int32_t* scores, const ChunkNumbers& n, const std::uint8_t* const* seen, const std::int64_t* visible,
           std::int64_t tokens, std::int64_t rows, Row* state, std::int8_t* fixed) {
  for (std::int64_t r = 0; r < rows; ++r)
    weigh_row(scores + r * kExact, n, seen[r], visible[r], tokens, state[r], fixed + r * fixed_bytes(kExact));
}

void accumulate(const std::int8_t* fixed, const Row* state, std::int64_t rows, const std::uint8_t* codes,
                std::int64_t stride, std::int64_t tokens, std::int64_t size, float* sums, std::int64_t sums_stride,
                std::int8_t*, const std::uint8_t*) {
  constexpr std::int64_t kBlock = 64;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t first = 0; first < size; first += kBlock) {
      const std::int16_t* w = numbers_of(fixed + r * fixed_bytes(kExact));
      const std::int64_t width = std::min(kBlock, size - first);
      std::int32_t block[kBlock] = {};
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t d = 0; d < width; ++d)
          block[d] += std::int32_t(w[t]) * std::int32_t(codes[t * stride + first + d]);
      float* out = sums + r * sums_stride + first;
      for (std::int64_t d = 0; d < width; ++d)
        out[d] = out[d] * state[r].fade + (float(block[d]) - state[r].weight_offset) * state[r].weight_step;
    }
}

}  // namespace

const AttentionKernels kAttentionPortable = {kExact, widen, load, store, to_fixed, score, weigh, accumulate};

}  // namespace qquant
