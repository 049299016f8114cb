// Quantizing and dequantizing in plain C++, and the choice between this and the versions for one instruction set.

#include "kv_codes.h"

#include <algorithm>

#include "isa.h"

// A product fused into a sum rounds once where the reference rounds twice.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace qquant {

namespace {

// 2^23: a float32 of this size has no fraction left, so adding it rounds to the nearest integer, ties to even.
constexpr float kRounder = 0x1p23f;

struct Grid {
  std::uint16_t scale, zero;
};

Grid choose_range(float low, float high) {
  const float step = high * kShare - low * kShare;
  const float wanted = std::min(std::max(std::max(step, std::max(high, -low) * kMinRelativeStep), kMinStep), kMaxStep);
  std::uint16_t scale = to_half(wanted);
  if (from_half(scale) < wanted) ++scale;
  return {scale, to_half(std::min(std::max(-low / from_half(scale), -kMaxZero), kMaxZero))};
}

void encode(const EncodeRun& run) {
  for (std::int64_t i = 0; i < run.count; ++i) {
    const std::int64_t first = i * run.stride;
    float low = load_real(run.states, first, run.dtype), high = low;
    for (std::int64_t d = 1; d < run.size; ++d) {
      const float value = load_real(run.states, first + d, run.dtype);
      low = std::min(low, value);
      high = std::max(high, value);
    }
    const Grid grid = choose_range(low, high);
    const float inverse = 1.0f / from_half(grid.scale), zero = from_half(grid.zero);
    std::uint8_t* codes = run.codes + i * run.code_stride;
    for (std::int64_t d = 0; d < run.size; ++d) {
      const float code = load_real(run.states, first + d, run.dtype) * inverse + zero;
      // Clamped before it is rounded: the ends are integers, so the order does not matter. NaN becomes 0.
      const float clamped = code > 0.0f ? (code < 255.0f ? code : 255.0f) : 0.0f;
      codes[d] = std::uint8_t(bits_of(clamped + kRounder));
    }
    run.scale[i] = grid.scale;
    run.zero[i] = grid.zero;
  }
}

void decode(const DecodeRun& run) {
  for (std::int64_t i = 0; i < run.count; ++i) {
    const float scale = from_half(run.scale[i]), zero = from_half(run.zero[i]);
    const std::uint8_t* codes = run.codes + i * run.code_stride;
    for (std::int64_t d = 0; d < run.size; ++d)
      store_real(run.out, i * run.size + d, scale * (float(codes[d]) - zero), run.dtype);
  }
}

}  // namespace

const CodeKernels kCodesPortable = {encode, decode};

const CodeKernels& code_kernels() {
#if QQ_X86
  if (isa() >= Isa::avx512_vnni) return kCodesAvx512;
  if (isa() >= Isa::avx2) return kCodesAvx2;
#endif
  return kCodesPortable;
}

}  // namespace qquant
