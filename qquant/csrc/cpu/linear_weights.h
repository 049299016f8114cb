// The weights of panels unpacked to plain rows: the contract of the kernels behind panel_weights.
//
// Every version computes scale * (code - zero) in float32 and rounds it once to the dtype of the result, so that all of
// them and the reference agree bit for bit; a scale that is not finite gives a NaN or an infinity in the same places.

#pragma once

#include <cstdint>

#include "linear.h"

namespace qquant {

// Writes the rows of panels first_panel to last_panel - 1 into `out`, which is [panels * 16][columns] of `dtype` and
// begins at panel 0. Ranges of panels may be unpacked side by side.
void unpack_weights(const Panels& weight, void* out, Real dtype, std::int64_t first_panel, std::int64_t last_panel);

}  // namespace qquant
