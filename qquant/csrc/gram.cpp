// H += X^T X for bfloat16 X and float32 H, upper triangle only: the sum that GPTQ's Hessians are made of. And M += D^T X,
// all of it: the sum that says how inputs differ from the original model's.
//
// A bfloat16 product is exact in float32, so feeding the rows as they are to the bfloat16 dot-product instruction loses
// nothing against converting them first, at twice the rate. Needs AVX-512 BF16; elsewhere available() is false and the
// caller multiplies in float32. Addresses come in as integers: this module knows no tensor type.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define QQ_BF16_DOT 1
#include <immintrin.h>
#else
#define QQ_BF16_DOT 0
#endif

namespace py = pybind11;

namespace {

constexpr std::size_t kPanel = 48;  // columns of X per panel: three vectors of 16, and six micro-tiles of eight rows
constexpr std::size_t kRows = 8;    // rows of a micro-tile: 8 x 3 accumulators leave registers for the operands
constexpr std::size_t kPairs = 128;  // token pairs per pass: one panel of them (24 KiB) stays in the first-level cache

#if QQ_BF16_DOT

// Repacks tokens [first, first + 2 * pairs) of X into panels [panel][pair][column], each element the two tokens' values
// of one column side by side, as the dot-product instruction takes them. Missing tokens and columns become zero.
void pack(const std::uint16_t* x, std::size_t tokens, std::size_t columns, std::size_t first, std::size_t pairs,
          std::uint32_t* packed) {
  const std::size_t panels = (columns + kPanel - 1) / kPanel;
  for (std::size_t panel = 0; panel < panels; ++panel) {
    const std::size_t begin = panel * kPanel, count = std::min(kPanel, columns - begin);
    for (std::size_t pair = 0; pair < pairs; ++pair) {
      const std::size_t token = first + 2 * pair;
      const std::uint16_t* low = x + token * columns + begin;
      const bool has_high = token + 1 < tokens;
      std::uint32_t* out = packed + (panel * pairs + pair) * kPanel;
      for (std::size_t c = 0; c < count; ++c)
        out[c] = std::uint32_t(low[c]) | (has_high ? std::uint32_t(low[columns + c]) << 16 : 0u);
      for (std::size_t c = count; c < kPanel; ++c) out[c] = 0;
    }
  }
}

// h[8][48] += left[pairs][8]^T right[pairs][48]; left lies inside a panel, so its rows are kPanel apart. `width` columns
// and `height` rows of h exist.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void tile(const std::uint32_t* left,
                                                                          const std::uint32_t* right, std::size_t pairs,
                                                                          float* h, std::size_t stride,
                                                                          std::size_t height, std::size_t width) {
  __m512 sum[kRows][3];
  for (auto& row : sum)
    for (auto& vector : row) vector = _mm512_setzero_ps();
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    const std::uint32_t* r = right + pair * kPanel;
    const __m512bh r0 = (__m512bh)_mm512_loadu_si512(r);
    const __m512bh r1 = (__m512bh)_mm512_loadu_si512(r + 16);
    const __m512bh r2 = (__m512bh)_mm512_loadu_si512(r + 32);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kRows; ++i) {
      const __m512bh l = (__m512bh)_mm512_set1_epi32(int(left[pair * kPanel + i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], l, r0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], l, r1);
      sum[i][2] = _mm512_dpbf16_ps(sum[i][2], l, r2);
    }
  }
  for (std::size_t i = 0; i < height; ++i)
    for (std::size_t v = 0; v < 3 && v * 16 < width; ++v) {
      const std::size_t left_over = std::min<std::size_t>(16, width - v * 16);
      const __mmask16 mask = static_cast<__mmask16>((1u << left_over) - 1u);
      float* target = h + i * stride + v * 16;
      _mm512_mask_storeu_ps(target, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target), sum[i][v]));
    }
}

// All tiles of one row of panels, on and right of the diagonal.
void panel_row(const std::uint32_t* packed, std::size_t pairs, std::size_t columns, std::size_t row, float* h) {
  const std::size_t panels = (columns + kPanel - 1) / kPanel, top = row * kPanel;
  for (std::size_t column = row; column < panels; ++column) {
    const std::size_t begin = column * kPanel, width = std::min(kPanel, columns - begin);
    for (std::size_t i = 0; i < kPanel && top + i < columns; i += kRows)
      tile(packed + row * pairs * kPanel + i, packed + column * pairs * kPanel, pairs,
           h + (top + i) * columns + begin, columns, std::min(kRows, columns - top - i), width);
  }
}

// All tiles of one row of panels of M [rows, columns]: `left` holds the panels of D, `right` those of X.
void cross_panel_row(const std::uint32_t* left, const std::uint32_t* right, std::size_t pairs, std::size_t rows,
                     std::size_t columns, std::size_t row, float* m) {
  const std::size_t panels = (columns + kPanel - 1) / kPanel, top = row * kPanel;
  for (std::size_t column = 0; column < panels; ++column) {
    const std::size_t begin = column * kPanel, width = std::min(kPanel, columns - begin);
    for (std::size_t i = 0; i < kPanel && top + i < rows; i += kRows)
      tile(left + row * pairs * kPanel + i, right + column * pairs * kPanel, pairs, m + (top + i) * columns + begin,
           columns, std::min(kRows, rows - top - i), width);
  }
}

// Calls work(row) for every row of panels, on several threads if there is enough to do.
template <typename Work>
void share_rows(std::size_t panels, std::size_t columns, std::size_t threads, const Work& work) {
  std::atomic<std::size_t> next{0};
  const auto loop = [&] {
    for (std::size_t row = next++; row < panels; row = next++) work(row);
  };
  // Starting a thread costs more than a small matrix.
  const std::size_t helpers = columns < 1024 ? 0 : std::min(threads, panels) - 1;
  std::vector<std::thread> pool;
  for (std::size_t i = 0; i < helpers; ++i) pool.emplace_back(loop);
  loop();
  for (auto& thread : pool) thread.join();
}

std::size_t panels_of(std::size_t columns) { return (columns + kPanel - 1) / kPanel; }

#endif

bool available() {
#if QQ_BF16_DOT
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// x: address of [tokens, columns] bfloat16, contiguous. h: address of [columns, columns] float32, contiguous; its blocks
// of 48 x 48 on and above the diagonal are added to, the rest is left alone. The result does not depend on `threads`.
void add_gram(std::uintptr_t x, std::size_t tokens, std::size_t columns, std::uintptr_t h, std::size_t threads) {
  if (!available()) throw py::value_error("this processor has no AVX-512 BF16; multiply in float32 instead");
#if QQ_BF16_DOT
  py::gil_scoped_release unlocked;
  const auto* source = reinterpret_cast<const std::uint16_t*>(x);
  auto* target = reinterpret_cast<float*>(h);
  const std::size_t panels = panels_of(columns);
  std::vector<std::uint32_t> packed(panels * kPanel * std::min(kPairs, (tokens + 1) / 2));
  for (std::size_t first = 0; first < tokens; first += 2 * kPairs) {
    const std::size_t pairs = std::min(kPairs, (tokens - first + 1) / 2);
    pack(source, tokens, columns, first, pairs, packed.data());
    share_rows(panels, columns, threads,
               [&](std::size_t row) { panel_row(packed.data(), pairs, columns, row, target); });
  }
#endif
}

// d: address of [tokens, rows] bfloat16, x: of [tokens, columns] bfloat16, m: of [rows, columns] float32; all
// contiguous. Adds D^T X to M. The result does not depend on `threads`.
void add_cross(std::uintptr_t d, std::uintptr_t x, std::size_t tokens, std::size_t rows, std::size_t columns,
               std::uintptr_t m, std::size_t threads) {
  if (!available()) throw py::value_error("this processor has no AVX-512 BF16; multiply in float32 instead");
#if QQ_BF16_DOT
  py::gil_scoped_release unlocked;
  const auto* left = reinterpret_cast<const std::uint16_t*>(d);
  const auto* right = reinterpret_cast<const std::uint16_t*>(x);
  auto* target = reinterpret_cast<float*>(m);
  const std::size_t most = kPanel * std::min(kPairs, (tokens + 1) / 2);
  std::vector<std::uint32_t> packed_left(panels_of(rows) * most), packed_right(panels_of(columns) * most);
  for (std::size_t first = 0; first < tokens; first += 2 * kPairs) {
    const std::size_t pairs = std::min(kPairs, (tokens - first + 1) / 2);
    pack(left, tokens, rows, first, pairs, packed_left.data());
    pack(right, tokens, columns, first, pairs, packed_right.data());
    share_rows(panels_of(rows), columns, threads, [&](std::size_t row) {
      cross_panel_row(packed_left.data(), packed_right.data(), pairs, rows, columns, row, target);
    });
  }
#endif
}

}  // namespace

PYBIND11_MODULE(_gram, m) {
  m.doc() = "H += X^T X for bfloat16 rows, accumulated in float32";
  m.def("available", &available, "Whether this processor can run add_gram");
  m.def("add_cross", &add_cross, py::arg("d"), py::arg("x"), py::arg("tokens"), py::arg("rows"), py::arg("columns"),
        py::arg("m"), py::arg("threads"), "Add D^T X to M; d, x and m are addresses");
  m.def("add_gram", &add_gram, py::arg("x"), py::arg("tokens"), py::arg("columns"), py::arg("h"), py::arg("threads"),
        "Add X^T X to the blocks of H on and above the diagonal; x and h are addresses");
}
