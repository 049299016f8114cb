// Binds the kernel of cpu/pack_panels.h to the operators that linear_ops.py declares. Checks of what it cannot take and
// the split over torch's threads live here; the kernel knows nothing of torch.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "cpu/isa.h"
#include "cpu/pack_panels.h"
#include "panel_tensors.h"

namespace {

using qquant::empty;
using qquant::has_shape;
using qquant::kMovedPanels;
using qquant::kPanelRows;
using qquant::shape_of;
using qquant::together;
using qquant::WordMove;
using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

constexpr std::int64_t kGrainBytes = std::int64_t{1} << 20;  // moved per thread: less is not worth waking one

std::int64_t panels_of(std::int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// `given` names columns of words of `steps`. Moving them is far more work than this look at each.
Tensor take_columns(const Tensor& given, std::int64_t steps, std::int64_t bits) {
  const std::int64_t codes = 32 / bits;
  STD_TORCH_CHECK(given.dim() == 1 && given.scalar_type() == ScalarType::Int && given.size(0) % codes == 0,
                  "columns must be int32 and fill whole words of ", codes, " codes, got ", shape_of(given), " ",
                  toString(given.scalar_type()));
  Tensor columns = together(given);
  const auto* const column = static_cast<const std::int32_t*>(columns.const_data_ptr());
  if (columns.numel() == 0) return columns;
  const auto [low, high] = std::minmax_element(column, column + columns.numel());
  STD_TORCH_CHECK(-1 <= *low && *high < steps * codes, "columns must be -1..", steps * codes - 1, ", got ", *low, "..",
                  *high);
  return columns;
}

void check_bits(std::int64_t bits) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
}

void move_all(const WordMove& move, std::int64_t panels) {
  qquant::isa();  // which refuses a QQUANT_CPU_ISA it does not know: here, not in one of the threads
  const std::int64_t band_bytes = kMovedPanels * kPanelRows * move.to_places.steps * 4;
  qquant::split(panels, kMovedPanels, band_bytes, kGrainBytes, [&](std::int64_t first, std::int64_t last) {
    qquant::move_words(move, first, last);
  });
}

void words_to_panels(const Tensor& out, const Tensor& words, const std::optional<Tensor>& columns, std::int64_t bits) {
  check_bits(bits);
  STD_TORCH_CHECK(words.dim() == 2 && words.scalar_type() == ScalarType::Int, "words must be [S, N] int32, got ",
                  shape_of(words), " ", toString(words.scalar_type()));
  std::optional<Tensor> held_columns;
  if (columns.has_value()) held_columns = take_columns(*columns, words.size(0), bits);
  const std::int64_t rows = words.size(1), panels = panels_of(rows);
  const std::int64_t steps = held_columns ? held_columns->numel() * bits / 32 : words.size(0);
  STD_TORCH_CHECK(has_shape(out, {panels, steps, kPanelRows}) && out.scalar_type() == ScalarType::Int &&
                      out.is_contiguous(),
                  "out must be [", panels, ", ", steps, ", ", kPanelRows, "] int32 and contiguous, got ",
                  shape_of(out), " ", toString(out.scalar_type()), out.is_contiguous() ? "" : ", not contiguous");
  if (out.numel() == 0) return;
  const Tensor held = rows <= 1 || words.stride(1) == 1 ? words : torch::stable::contiguous(words);
  WordMove move{};
  move.from = static_cast<const std::uint32_t*>(held.const_data_ptr());
  move.from_places = {words.size(0), held.stride(0), kPanelRows, rows};
  move.to = static_cast<std::uint32_t*>(out.mutable_data_ptr());
  move.to_places = {steps, kPanelRows, kPanelRows * steps, panels * kPanelRows};
  move.columns = held_columns ? static_cast<const std::int32_t*>(held_columns->const_data_ptr()) : nullptr;
  move.bits = int(bits);
  move_all(move, panels);
}

Tensor panels_to_words(const Tensor& panels, const std::optional<Tensor>& columns, std::int64_t rows,
                       std::int64_t bits) {
  check_bits(bits);
  STD_TORCH_CHECK(panels.dim() == 3 && panels.size(2) == kPanelRows && panels.scalar_type() == ScalarType::Int,
                  "panels must be [P, T, ", kPanelRows, "] int32, got ", shape_of(panels), " ",
                  toString(panels.scalar_type()));
  std::optional<Tensor> held_columns;
  if (columns.has_value()) held_columns = take_columns(*columns, panels.size(1), bits);
  STD_TORCH_CHECK(rows >= 0 && panels_of(rows) == panels.size(0), "rows must fill ", panels.size(0), " panels of ",
                  kPanelRows, ", got ", rows);
  const std::int64_t steps = panels.size(1), shape[] = {held_columns ? held_columns->numel() * bits / 32 : steps, rows};
  Tensor words = empty(shape, 2, aoti_torch_dtype_int32());
  if (words.numel() == 0) return words;
  const Tensor held = together(panels);
  WordMove move{};
  move.from = static_cast<const std::uint32_t*>(held.const_data_ptr());
  move.from_places = {steps, kPanelRows, kPanelRows * steps, panels.size(0) * kPanelRows};
  move.to = static_cast<std::uint32_t*>(words.mutable_data_ptr());
  move.to_places = {shape[0], rows, kPanelRows, rows};
  move.columns = held_columns ? static_cast<const std::int32_t*>(held_columns->const_data_ptr()) : nullptr;
  move.bits = int(bits);
  move_all(move, panels.size(0));
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qquant, CPU, m) {
  m.impl("words_to_panels", TORCH_BOX(&words_to_panels));
  m.impl("panels_to_words", TORCH_BOX(&panels_to_words));
}
