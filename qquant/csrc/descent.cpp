// Rounding that looks at a linear's outputs: codes of one column chosen one after another, and coordinate descent over
// finished codes, where each goes where trace(O E H E^T) is least while all others stay.
//
// The caller multiplies with whole matrices once per block of columns; inside a block this loop keeps the gradient
// exact after every move. O is block-diagonal, and blocks of rows never see one another: they are what threads share,
// so that the result does not depend on their number. Addresses come in as integers: this module knows no tensor type.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

// One block of columns. All matrices but corner and metric are [columns or groups][rows].
template <typename T>
struct Block {
  T* pulls;                      // O E H, kept exact here
  T* moves;                      // by how much each weight moved
  const T* metric;               // [rows / side][side][side]: O's diagonal blocks; null: the identity
  const T* corner;               // [columns][columns]: the block of H
  std::uint8_t* codes;
  const T* scales;
  const std::int64_t* group_of;  // [columns]
  std::size_t columns, rows, side;
  int top;
};

// Rows [first, first + side) of a block of columns; returns how many codes moved.
template <typename T>
std::int64_t descend_rows(const Block<T>& b, std::size_t first, std::vector<T>& felt) {
  std::int64_t moved = 0;
  const std::size_t count = std::min(b.side, b.rows - first);
  const T* metric = b.metric ? b.metric + first * b.side : nullptr;
  for (std::size_t j = 0; j < b.columns; ++j) {
    T* pull = b.pulls + j * b.rows + first;
    T* move = b.moves + j * b.rows + first;
    std::uint8_t* code = b.codes + j * b.rows + first;
    const T* scale = b.scales + std::size_t(b.group_of[j]) * b.rows + first;
    const T own = b.corner[j * b.columns + j];
    bool any = false;
    std::fill(felt.begin(), felt.end(), T(0));
    for (std::size_t i = 0; i < count; ++i) {
      const T* row = metric ? metric + i * b.side : nullptr;
      const T curvature = own * (row ? row[i] : T(1));
      if (!(curvature > T(0)) || scale[i] == T(0)) continue;
      const T wanted = std::nearbyint(T(code[i]) - pull[i] / (curvature * scale[i]));
      if (!(wanted == wanted)) continue;  // NaN moves nothing
      const int next = int(std::min(std::max(wanted, T(0)), T(b.top)));
      if (next == code[i]) continue;
      const T change = scale[i] * T(next - int(code[i]));
      code[i] = std::uint8_t(next);
      move[i] += change;
      any = true;
      ++moved;
      if (!row) {
        felt[i] = change;
        continue;
      }
      for (std::size_t k = 0; k < count; ++k) felt[k] += change * row[k];
      for (std::size_t k = i + 1; k < count; ++k) pull[k] += own * change * row[k];
    }
    if (!any) continue;
    for (std::size_t c = j + 1; c < b.columns; ++c) {
      const T share = b.corner[j * b.columns + c];
      T* later = b.pulls + c * b.rows + first;
      for (std::size_t k = 0; k < count; ++k) later[k] += share * felt[k];
    }
  }
  return moved;
}

template <typename T>
std::int64_t descend(const Block<T>& block, std::size_t threads) {
  std::atomic<std::size_t> next{0};
  std::atomic<std::int64_t> moved{0};
  const auto work = [&] {
    std::vector<T> felt(block.side);
    for (std::size_t first = next.fetch_add(block.side); first < block.rows; first = next.fetch_add(block.side))
      moved += descend_rows(block, first, felt);
  };
  const std::size_t useful = std::min(threads, (block.rows + block.side - 1) / block.side);
  std::vector<std::thread> others;
  for (std::size_t t = 1; t < useful; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return moved;
}

// Rounds one column of weights [rows] to codes, one output after another: what the rounding of one leaves is made up for
// by those of its block that come later, as GPTQ does along the inputs. order [rows]: which row of the block is visited
// at each step; factor [rows / side][side][side]: V of O^-1 = V^T V, V upper triangular in that order.
template <typename T>
void round_rows(const T* weights, std::uint8_t* codes, const T* scales, const T* zeros, const T* factor,
                const std::int64_t* order, std::size_t side, int top, std::size_t first, T* wanted) {
  const T* v = factor + first * side;
  for (std::size_t i = 0; i < side; ++i) wanted[i] = weights[first + std::size_t(order[first + i])];
  for (std::size_t i = 0; i < side; ++i) {
    const std::size_t row = first + std::size_t(order[first + i]);
    const T code = std::nearbyint(wanted[i] / scales[row]) + zeros[row];
    const T kept = code > T(0) ? std::min(code, T(top)) : T(0);  // NaN becomes 0, too
    codes[row] = std::uint8_t(kept);
    const T error = (wanted[i] - scales[row] * (kept - zeros[row])) / v[i * side + i];
    for (std::size_t k = i + 1; k < side; ++k) wanted[k] -= error * v[i * side + k];
  }
}

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
std::int64_t descend_at(std::uintptr_t pulls, std::uintptr_t moves, std::uintptr_t metric, std::uintptr_t corner,
                        std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t group_of, std::size_t columns,
                        std::size_t rows, std::size_t side, int top, std::size_t threads) {
  const py::gil_scoped_release release;
  return descend(Block<T>{at<T>(pulls), at<T>(moves), at<const T>(metric), at<const T>(corner),
                          at<std::uint8_t>(codes), at<const T>(scales), at<const std::int64_t>(group_of), columns, rows,
                          side, top},
                 threads);
}

template <typename T>
void round_rows_at(std::uintptr_t weights, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros,
                   std::uintptr_t factor, std::uintptr_t order, std::size_t rows, std::size_t side, int top) {
  const py::gil_scoped_release release;
  std::vector<T> wanted(side);
  for (std::size_t first = 0; first < rows; first += side)
    round_rows(at<const T>(weights), at<std::uint8_t>(codes), at<const T>(scales), at<const T>(zeros),
               at<const T>(factor), at<const std::int64_t>(order), side, top, first, wanted.data());
}

}  // namespace

PYBIND11_MODULE(_descent, module) {
  module.doc() = "Coordinate descent over quantized codes.";
  module.def("round_rows_float", &round_rows_at<float>);
  module.def("round_rows_double", &round_rows_at<double>);
  module.def("descend_float", &descend_at<float>);
  module.def("descend_double", &descend_at<double>);
}
