// Products with packed weights in plain C++, for any processor: the arithmetic of linear.h written down once. Loops run
// over the 16 rows of a panel, side by side in memory, so that any compiler makes vectors of them.

#include <algorithm>
#include <cmath>

#include "linear.h"

namespace qquant {

namespace {

constexpr std::int64_t kTokens = 16;  // that an unpacked block serves

// A block's codes of 24 bits are two numbers, high * 256 + low, whose sums each fit 32 bits; others are one.
int planes_of(const Linear& problem) { return problem.activation_bits == 24 ? 2 : 1; }

// The workspace: codes, [token][plane][column]; then steps, [token][block].
std::int64_t codes_bytes(const Linear& problem) {
  return 2 * problem.tokens * planes_of(problem) * problem.weight.columns();
}

std::int64_t workspace_bytes(const Linear& problem) {
  return codes_bytes(problem) + 4 * problem.tokens * problem.weight.blocks();
}

std::int64_t any_grain(const Linear&) { return 1; }

template <Real DTYPE>
void load(const Linear& problem, std::int64_t token, std::int64_t begin, std::int64_t end, float* values) {
  const std::int64_t row = token * problem.stride;
  for (std::int64_t k = begin; k < end; ++k) {
    const std::int64_t from = problem.order == nullptr ? k : problem.order[k];
    values[k - begin] = from < 0 ? 0.0f : load_real(problem.x, row + from, DTYPE);
  }
}

// The largest magnitude, or NaN where there is one.
float largest_of(const float* values, std::int64_t width) {
  float largest = 0.0f;
  for (std::int64_t k = 0; k < width && largest == largest; ++k)
    if (!(std::fabs(values[k]) <= largest)) largest = std::fabs(values[k]);
  return largest;
}

void encode(const Linear& problem, std::int64_t first, std::int64_t last, std::uint8_t* workspace) {
  const Panels& weight = problem.weight;
  const std::int64_t columns = weight.columns(), blocks = weight.blocks();
  const int bits = problem.activation_bits, planes = planes_of(problem);
  const float limit = float(bits == 8 ? kLimit8 : bits == 16 ? kLimit16 : kLimit24);
  const auto load_block = problem.dtype == Real::float32   ? load<Real::float32>
                          : problem.dtype == Real::float16 ? load<Real::float16>
                                                           : load<Real::bfloat16>;
  float values[kBlockColumns];
  for (std::int64_t token = first; token < last; ++token) {
    auto* const codes = reinterpret_cast<std::int16_t*>(workspace) + token * planes * columns;
    auto* const steps = reinterpret_cast<float*>(workspace + codes_bytes(problem)) + token * blocks;
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t begin = weight.begin_of(block), width = weight.end_of(block) - begin;
      load_block(problem, token, begin, begin + width, values);
      const float step = step_of(largest_of(values, width), bits);
      steps[block] = step;
      for (std::int64_t k = 0; k < width; ++k) {
        const float wanted = step > 0.0f ? std::nearbyint(values[k] / step) : 0.0f;
        const auto code = std::int32_t(std::min(std::max(wanted, -limit), limit));
        const std::int32_t low = planes == 2 ? ((code + 128) & 255) - 128 : code;
        codes[begin + k] = std::int16_t(planes == 2 ? (code - low) / 256 : code);
        if (planes == 2) codes[columns + begin + k] = std::int16_t(low);
      }
    }
  }
}

// code - zero of a block of one panel, [column][row].
template <int BITS>
void unpack(const std::uint32_t* words, std::int64_t width, const std::int32_t* zero, std::int16_t* out) {
  for (std::int64_t k = 0; k < width; ++k, out += kPanelRows) {
    const std::uint32_t* const word = words + k / (32 / BITS) * kPanelRows;
    const int shift = int(k % (32 / BITS)) * BITS;
    for (std::int64_t row = 0; row < kPanelRows; ++row)
      out[row] = std::int16_t(std::int32_t(word[row] >> shift & ((1u << BITS) - 1)) - zero[row]);
  }
}

void sum_block(const std::int16_t* weights, const std::int16_t* codes, std::int64_t width, std::int32_t* out) {
  std::int32_t sums[kPanelRows] = {};
  for (std::int64_t k = 0; k < width; ++k)
    for (std::int64_t row = 0; row < kPanelRows; ++row)
      sums[row] += std::int32_t(weights[k * kPanelRows + row]) * codes[k];
  std::copy_n(sums, kPanelRows, out);
}

void multiply_panel(const Linear& problem, const std::uint8_t* workspace, const Slice& slice, std::int64_t panel,
                    std::int64_t token, std::int64_t count) {
  const Panels& weight = problem.weight;
  const std::int64_t columns = weight.columns(), blocks = weight.blocks(), planes = planes_of(problem);
  const auto* const codes = reinterpret_cast<const std::int16_t*>(workspace) + token * planes * columns;
  const auto* const steps = reinterpret_cast<const float*>(workspace + codes_bytes(problem)) + token * blocks;
  std::int16_t weights[kBlockColumns * kPanelRows];
  std::int32_t zero[kPanelRows], high[kPanelRows], low[kPanelRows] = {};
  float totals[kTokens][kPanelRows] = {}, scale[kPanelRows];
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t begin = weight.begin_of(block), width = weight.end_of(block) - begin;
    for (std::int64_t row = 0; row < kPanelRows; ++row) {
      zero[row] = zero_of(weight, panel, weight.group_of(block), row);
      scale[row] = scale_of(weight, panel, weight.group_of(block), row);
    }
    const auto* const words = weight.words + (panel * weight.steps + begin / weight.step_columns()) * kPanelRows;
    (weight.bits == 4 ? unpack<4> : unpack<8>)(words, width, zero, weights);
    for (std::int64_t t = 0; t < count; ++t) {
      sum_block(weights, codes + t * planes * columns + begin, width, high);
      if (planes == 2) sum_block(weights, codes + (t * planes + 1) * columns + begin, width, low);
      for (std::int64_t row = 0; row < kPanelRows; ++row) {
        const float sum = planes == 2 ? float(high[row]) * 256.0f + float(low[row]) : float(high[row]);
        totals[t][row] += sum * (steps[t * blocks + block] * scale[row]);
      }
    }
  }
  const std::int64_t feature = (panel - slice.panel) * kPanelRows, rows = std::min(kPanelRows, slice.width - feature);
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int64_t row = 0; row < rows; ++row) {
      const float bias = problem.bias == nullptr ? 0.0f : problem.bias[panel * kPanelRows + row];
      store_real(slice.out, (token + t) * slice.width + feature + row, totals[t][row] + bias, problem.dtype);
    }
}

void multiply(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last) {
  const Slice* slice = problem.slices;
  for (std::int64_t panel = first; panel < last; ++panel) {
    while (panel >= slice->panel + (slice->width + kPanelRows - 1) / kPanelRows) ++slice;
    for (std::int64_t token = 0; token < problem.tokens; token += kTokens)
      multiply_panel(problem, workspace, *slice, panel, token, std::min(kTokens, problem.tokens - token));
  }
}

}  // namespace

const LinearKernels kLinearPortable = {workspace_bytes, any_grain, encode, any_grain, multiply};

}  // namespace qquant
