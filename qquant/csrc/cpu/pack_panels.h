// Words of codes moved from a checkpoint's rows to panels and back, with columns in another order where that is asked
// for: the contract of the kernel behind words_to_panels and panels_to_words. Nothing here knows of torch.

#pragma once

#include <cstdint>

namespace qquant {

// Where words lie, each 32 / bits codes of neighbouring columns (a "step") of one output, lowest bits first. Those of
// the 16 outputs of a panel are side by side. In panels, [panels][steps][16], `step` is 16 and `panel` 16 * steps; in a
// qweight, [steps][outputs], `step` is the distance between its rows and `panel` is 16.
struct WordPlaces {
  std::int64_t steps;    // words of an output
  std::int64_t step;     // words from a step of a panel to its next
  std::int64_t panel;    // words from a panel to its next
  std::int64_t outputs;  // that have a place: 16 for each panel, or fewer in the last
};

struct WordMove {
  const std::uint32_t* from;
  WordPlaces from_places;
  std::uint32_t* to;
  WordPlaces to_places;
  // For each column of `to` that of `from`, -1 for codes of 0; null: the same, and both have the same steps.
  const std::int32_t* columns;
  int bits;  // 4 or 8
};

// Ranges of panels given to move_words begin at multiples of this.
constexpr std::int64_t kMovedPanels = 4;

// Writes the words of these panels; outputs that `from` has no place for are 0. Ranges may be moved at the same time.
void move_words(const WordMove& move, std::int64_t first_panel, std::int64_t last_panel);

}  // namespace qquant
