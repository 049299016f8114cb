// The door between torch and the kernels of packed linears: plain structs and C functions, known to both sides.
//
// Words, scales and zeros lie in panels of 16 rows, as linear_ops.py and docs/panels.md say; the same bytes serve the
// CPU. Strides and sizes count elements.

#pragma once

#include "launch.h"

constexpr int32_t kQqPanelRows = 16;
constexpr int32_t kQqMaxSlices = 8;
constexpr int32_t kQqMaxTokens = 64;

// Every zero is 0 to 2^bits. There are fewer than 2^31 scales, and fewer than 2^31 words in a panel.
struct QqPanels {
  const uint32_t* words;  // [panels][steps][16], 32 / bits codes each, from a multiple of 16 bytes on
  const void* scales;     // [panels][groups][16] float16, or float32 where half_scales is 0; aligned likewise
  const uint8_t* zeros;   // the same shape, from a multiple of 4 bytes on, or null: `zero` everywhere
  int64_t panels, steps, groups;
  int64_t group;  // columns of a group, a multiple of 32 / bits; the last group may be shorter
  int32_t zero, bits, half_scales;
};

// One of the results: `width` features from panel `panel` on, [tokens][width], of the activations' dtype.
struct QqSlice {
  void* out;
  int64_t panel, width;
};

// All linears that share an input. workspace: qq_panel_linear_workspace bytes from a multiple of 16 bytes on.
struct QqLinear {
  QqPanels weight;
  const void* x;         // [tokens][stride]
  const int32_t* order;  // [columns]: the column of x for each place, -1 for none; null: as they are
  const float* bias;     // [panels * 16], or null
  unsigned char* workspace;
  int64_t tokens, stride, features;  // features: of x; an order that names others makes NaN of them
  QqSlice slices[kQqMaxSlices];  // in order of their panels, which they cover
  int32_t slice_count;
  int32_t dtype;   // QqDtype of x and of the results
  int32_t splits;  // of qq_panel_linear_splits, or any other count from 1 to 64
};

// out [panels * 16][columns], contiguous, from a multiple of 16 bytes on.
struct QqWeights {
  QqPanels weight;
  void* out;
  int32_t dtype;
};

QQ_LAUNCHER int qq_panel_linear(const QqLinear* args, void* stream);
QQ_LAUNCHER int qq_panel_weights(const QqWeights* args, void* stream);

// Into how many parts the columns are cut beside those that a block's warps take. Depends on nothing but the shape and
// the number of multiprocessors, so that one shape always gives one sequence of sums.
QQ_LAUNCHER int32_t qq_panel_linear_splits(const QqLinear* args, int32_t multiprocessors);

// Bytes of workspace for args->splits: rearranged activations and the parts' sums. May be 0.
QQ_LAUNCHER int64_t qq_panel_linear_workspace(const QqLinear* args);
