// Products of activations with packed weights: the contract of the kernels behind panel_linear.
//
// Weights. The words of a GPTQ file, each 32 / bits codes of neighbouring columns (a "step") of one row, lowest bits
// first, lie in panels of 16 rows: words[panel][step][16]. Columns of one group are neighbours; where a file orders
// them otherwise, or a group does not fill its last word, the panels hold them sorted and padded and `order` says which
// column of x each place multiplies. weight(row, column) = scale[panel][group][row] * (code - zero), zero being
// zeros[panel][group][row], or one number for all.
//
// Activations are written as fixed point, one step per token and block. A block is 128 columns of a group; the last of
// a group may be shorter (see block_range). Of a block whose largest magnitude is `largest`:
//   8 bits   step = largest / 127                          code = round(x / step), -127..127
//   16 bits  step = the least power of two >= largest / 32639       "            -32639..32639
//   24 bits  step = the least power of two >= largest / 8355711     "            -8355711..8355711
// (all zero: step 0 and codes 0; not finite: step NaN, which the row of the result then is). 16 bits serve float16 and
// bfloat16, 24 float32: what is exact in a bfloat16 stays exact unless it is 2^7 times smaller than the largest of its
// block. 8 bits are for whoever asks for them. Codes times codes are summed exactly in 32-bit integers over one block;
// blocks are scaled and summed in float32, in the order of the columns, so that a result depends neither on the number
// of tokens in the call nor on threads.
//
// Nothing here knows of torch.

#pragma once

#include <algorithm>
#include <cstdint>

#include "half.h"

namespace qquant {

constexpr std::int64_t kPanelRows = 16;
constexpr std::int64_t kBlockColumns = 128;
constexpr std::int64_t kLimit8 = 127, kLimit16 = 127 * 256 + 127, kLimit24 = (127 * 256 + 127) * 256 + 127;

struct Panels {
  const std::uint32_t* words;  // [panels][steps][16]
  const void* scales;          // [panels][groups][16]
  bool half_scales;            // float16, or float32
  const std::uint8_t* zeros;   // [panels][groups][16], or null: `zero` everywhere
  std::int32_t zero;
  int bits;                    // 4 or 8
  std::int64_t panels, steps, groups;
  std::int64_t group;          // columns of a group, a multiple of step_columns(); the last group may be shorter

  std::int64_t step_columns() const { return 32 / bits; }
  std::int64_t columns() const { return steps * step_columns(); }
  std::int64_t blocks_per_group() const { return (group + kBlockColumns - 1) / kBlockColumns; }
  std::int64_t blocks() const {
    const std::int64_t last = columns() - (groups - 1) * group;
    return (groups - 1) * blocks_per_group() + (last + kBlockColumns - 1) / kBlockColumns;
  }
  std::int64_t group_of(std::int64_t block) const { return block / blocks_per_group(); }
  // First column of a block, and of the one after it.
  std::int64_t begin_of(std::int64_t block) const {
    return group_of(block) * group + block % blocks_per_group() * kBlockColumns;
  }
  std::int64_t end_of(std::int64_t block) const {
    return std::min({begin_of(block) + kBlockColumns, (group_of(block) + 1) * group, columns()});
  }
};

// One of the results: `width` features from panel `panel` on, [tokens][width], of the activations' dtype.
struct Slice {
  void* out;
  std::int64_t panel, width;
};

struct Linear {
  Panels weight;
  const void* x;  // [tokens][stride], elements of `dtype`
  Real dtype;
  std::int64_t tokens, stride;
  const std::int32_t* order;  // [columns]: the column of x for each place, -1 for none; null: as they are
  const float* bias;          // [panels * 16], or null
  int activation_bits;        // 8, 16 or 24
  const Slice* slices;        // in order of their panels; each begins at a panel of its own
  std::int64_t slice_count;
};

// How one instruction set computes a Linear: activations are encoded into a workspace, token ranges side by side, and
// then multiplied, ranges of panels side by side. Both may be called from several threads at once.
struct LinearKernels {
  std::int64_t (*workspace_bytes)(const Linear&);
  std::int64_t (*token_grain)(const Linear&);  // ranges given to encode begin at multiples of this
  void (*encode)(const Linear&, std::int64_t first_token, std::int64_t last_token, std::uint8_t* workspace);
  std::int64_t (*panel_grain)(const Linear&);  // ranges given to multiply begin at multiples of this
  void (*multiply)(const Linear&, const std::uint8_t* workspace, std::int64_t first_panel, std::int64_t last_panel);
};

// The fastest kernels for the instruction set that isa() names.
const LinearKernels& linear_kernels();
// Tiles of the weight, each number rounded to bfloat16 once, times bfloat16 activations, for many tokens; null where
// isa() lacks avx512_bf16. Takes bfloat16 activations only and ignores activation_bits: nothing of x is rounded.
const LinearKernels* tile_kernels();

extern const LinearKernels kLinearPortable, kLinearAvx2, kLinearAvx512Plain, kLinearAvx512, kLinearAvx512Tile;

// Step of a block whose largest magnitude is `largest`, see above.
inline float step_of(float largest, int activation_bits) {
  if (!(largest <= 3.4028234e38f)) return float_of(0x7fc00000u);  // also NaN
  if (activation_bits == 8) return largest / float(kLimit8);
  const float least = largest / float(activation_bits == 16 ? kLimit16 : kLimit24);
  if (least == 0.0f) return 0.0f;
  // Smallest normal number at least, so that its inverse is finite.
  return float_of((bits_of(std::max(least, 0x1p-126f)) + 0x7fffffu) & 0x7f800000u);
}

// The scale of row `row` (0..15) of a panel in a group.
inline float scale_of(const Panels& weight, std::int64_t panel, std::int64_t group, std::int64_t row) {
  const std::int64_t at = (panel * weight.groups + group) * kPanelRows + row;
  return weight.half_scales ? from_half(static_cast<const std::uint16_t*>(weight.scales)[at])
                            : static_cast<const float*>(weight.scales)[at];
}

inline std::int32_t zero_of(const Panels& weight, std::int64_t panel, std::int64_t group, std::int64_t row) {
  return weight.zeros == nullptr ? weight.zero : weight.zeros[(panel * weight.groups + group) * kPanelRows + row];
}

}  // namespace qquant
