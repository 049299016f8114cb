// Quantizing and dequantizing runs of vectors: the contract of the kernels behind kv_append and kv_dequantize.
//
// Every version repeats choose_range, encode and decode of kv_ops.py in float32, operation by operation and none fused,
// so that all of them and the reference agree bit for bit. A vector with NaN gets arbitrary codes.

#pragma once

#include <cstdint>

#include "half.h"

namespace qquant {

constexpr float kShare = float(1.0 / 255.0);
constexpr float kMinRelativeStep = 0x1p-11f;
constexpr float kMinStep = 0x1p-24f;
constexpr float kMaxStep = 65504.0f;
constexpr float kMaxZero = 1.0f / kMinRelativeStep;

// `count` vectors of `size` elements of `dtype`, `stride` elements apart; codes lie `code_stride` bytes apart; scale
// and zero, float16, side by side.
struct EncodeRun {
  const void* states;
  Real dtype;
  std::int64_t stride, count, size;
  std::uint8_t* codes;
  std::int64_t code_stride;
  std::uint16_t* scale;
  std::uint16_t* zero;
};

// The way back, into vectors that lie side by side.
struct DecodeRun {
  const std::uint8_t* codes;
  std::int64_t code_stride, count, size;
  const std::uint16_t* scale;
  const std::uint16_t* zero;
  void* out;
  Real dtype;
};

struct CodeKernels {
  void (*encode)(const EncodeRun&);
  void (*decode)(const DecodeRun&);
};

// The kernels for the instruction set that isa() names.
const CodeKernels& code_kernels();

extern const CodeKernels kCodesPortable, kCodesAvx2, kCodesAvx512;

}  // namespace qquant
