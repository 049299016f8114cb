// Words moved between rows and panels, a band of four panels at a time. Where columns change places, the words of a
// band are first copied together, so that each code is then looked up in the second-level cache.

#include "pack_panels.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"

namespace qquant {

namespace {

constexpr std::int64_t kRows = 16;
constexpr std::int64_t kChunkSteps = 16;  // put together before they are written: 4 KB, in the first-level cache
constexpr int kLine = int(kMovedPanels * kRows);

// One step of a band.
struct alignas(64) Line {
  std::uint32_t words[kLine];
};

// How many words of a panel's step have a place.
std::int64_t width_of(const WordPlaces& places, std::int64_t panel) {
  return std::clamp<std::int64_t>(places.outputs - panel * kRows, 0, kRows);
}

// Writes 16 words: past the caches, which what is moved does not fit into, where they begin at a multiple of 16 bytes.
inline void write_words(std::uint32_t* to, const std::uint32_t* words) {
#if QQ_X86
  if (reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
    auto* const place = reinterpret_cast<__m128i*>(to);
    const auto* const vector = reinterpret_cast<const __m128i*>(words);
    for (int i = 0; i < 4; ++i) _mm_stream_si128(place + i, _mm_loadu_si128(vector + i));
    return;
  }
#endif
  std::memcpy(to, words, kRows * 4);
}

// Columns stay as they are.
void copy_band(const WordMove& move, std::int64_t panel) {
  const WordPlaces &source = move.from_places, &target = move.to_places;
  const std::uint32_t* from = move.from + panel * source.panel;
  std::uint32_t* to = move.to + panel * target.panel;
  const bool whole = std::min(source.outputs, target.outputs) >= (panel + kMovedPanels) * kRows;
  for (std::int64_t step = 0; step < target.steps; ++step, from += source.step, to += target.step) {
    if (whole) {
      // Unrolled, so that reads of several steps, each in another page, are under way at once.
#pragma GCC unroll 4
      for (std::int64_t p = 0; p < kMovedPanels; ++p) write_words(to + p * target.panel, from + p * source.panel);
      continue;
    }
    for (std::int64_t p = 0; p < kMovedPanels; ++p) {
      const std::int64_t width = width_of(target, panel + p);
      if (width == 0) break;
      std::uint32_t words[kRows] = {};
      std::memcpy(words, from + p * source.panel, width_of(source, panel + p) * 4);
      std::memcpy(to + p * target.panel, words, width * 4);
    }
  }
}

void read_band(const WordMove& move, std::int64_t panel, Line* lines) {
  const WordPlaces& places = move.from_places;
  const std::uint32_t* from = move.from + panel * places.panel;
  const bool whole = places.outputs >= (panel + kMovedPanels) * kRows;
  for (std::int64_t step = 0; step < places.steps; ++step, from += places.step) {
    std::uint32_t* const words = lines[step].words;
    if (whole) {
#pragma GCC unroll 4
      for (std::int64_t p = 0; p < kMovedPanels; ++p)
        std::memcpy(words + p * kRows, from + p * places.panel, kRows * 4);
      continue;
    }
    lines[step] = {};
    for (std::int64_t p = 0; p < kMovedPanels; ++p) {
      const std::int64_t width = width_of(places, panel + p);
      if (width == 0) break;
      std::memcpy(words + p * kRows, from + p * places.panel, width * 4);
    }
  }
}

void write_band(const WordMove& move, std::int64_t panel, std::int64_t first, std::int64_t count, const Line* lines) {
  const WordPlaces& places = move.to_places;
  std::uint32_t* const to = move.to + panel * places.panel + first * places.step;
  for (std::int64_t p = 0; p < kMovedPanels; ++p) {
    const std::int64_t width = width_of(places, panel + p);
    for (std::int64_t step = 0; step < count && width > 0; ++step) {
      std::uint32_t* const place = to + p * places.panel + step * places.step;
      if (width == kRows)
        write_words(place, lines[step].words + p * kRows);
      else
        std::memcpy(place, lines[step].words + p * kRows, width * 4);
    }
  }
}

// Puts `count` lines together: of each, 32 / BITS codes of every output, from those columns of `held`. The line before
// the first of `held` is zeros, which column -1 reads.
using Gather = void (*)(const Line* held, const std::int32_t* columns, std::int64_t count, Line* found);

template <int BITS>
void gather_portable(const Line* held, const std::int32_t* columns, std::int64_t count, Line* found) {
  constexpr int kCodes = 32 / BITS;
  constexpr std::uint64_t kMask = ((1u << BITS) - 1) * 0x100000001u;  // two words at a time
  for (std::int64_t step = 0; step < count; ++step, columns += kCodes) {
    std::uint64_t sums[kLine / 2] = {};
    for (int i = 0; i < kCodes; ++i) {
      const std::int64_t column = columns[i];
      const std::uint32_t* const words = held[(column + kCodes) / kCodes - 1].words;
      const int shift = int(column & (kCodes - 1)) * BITS;
      for (int pair = 0; pair < kLine / 2; ++pair) {
        std::uint64_t two;
        std::memcpy(&two, words + 2 * pair, 8);
        sums[pair] |= (two >> shift & kMask) << i * BITS;
      }
    }
    std::memcpy(found[step].words, sums, sizeof sums);
  }
}

#if QQ_X86

template <int BITS>
QQ_AVX2 void gather_avx2(const Line* held, const std::int32_t* columns, std::int64_t count, Line* found) {
  constexpr int kCodes = 32 / BITS, kVectors = kLine / 8;
  const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
  for (std::int64_t step = 0; step < count; ++step, columns += kCodes) {
    __m256i sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < kCodes; ++i) {
      const std::int64_t column = columns[i];
      const auto* const words = reinterpret_cast<const __m256i*>(held[(column + kCodes) / kCodes - 1].words);
      const __m128i shift = _mm_cvtsi32_si128(int(column & (kCodes - 1)) * BITS);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m256i code = _mm256_and_si256(mask, _mm256_srl_epi32(_mm256_load_si256(words + v), shift));
        sums[v] = _mm256_or_si256(sums[v], _mm256_slli_epi32(code, i * BITS));
      }
    }
    auto* const to = reinterpret_cast<__m256i*>(found[step].words);
    for (int v = 0; v < kVectors; ++v) _mm256_store_si256(to + v, sums[v]);
  }
}

template <int BITS>
QQ_AVX512_PLAIN void gather_avx512(const Line* held, const std::int32_t* columns, std::int64_t count, Line* found) {
  constexpr int kCodes = 32 / BITS, kVectors = kLine / 16;
  for (std::int64_t step = 0; step < count; ++step, columns += kCodes) {
    __m512i sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < kCodes; ++i) {
      const std::int64_t column = columns[i];
      const std::uint32_t* const words = held[(column + kCodes) / kCodes - 1].words;
      // Turned right, a code comes to the place of the i-th.
      const __m512i turn = _mm512_set1_epi32(int((column - i) & (kCodes - 1)) * BITS);
      const __m512i mask = _mm512_set1_epi32(int(((1u << BITS) - 1) << i * BITS));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __m512i turned = _mm512_rorv_epi32(_mm512_load_si512(words + 16 * v), turn);
        sums[v] = _mm512_ternarylogic_epi32(sums[v], turned, mask, 0xf8);  // sums | (turned & mask)
      }
    }
    for (int v = 0; v < kVectors; ++v) _mm512_store_si512(found[step].words + 16 * v, sums[v]);
  }
}

#endif

template <int BITS>
Gather gather_of() {
#if QQ_X86
  if (isa() >= Isa::avx512) return gather_avx512<BITS>;
  if (isa() >= Isa::avx2) return gather_avx2<BITS>;
#endif
  return gather_portable<BITS>;
}

void move_columns(const WordMove& move, std::int64_t first_panel, std::int64_t last_panel) {
  const Gather gather = move.bits == 8 ? gather_of<8>() : gather_of<4>();
  const std::int64_t codes = 32 / move.bits, steps = move.to_places.steps;
  std::vector<Line> held(std::size_t(move.from_places.steps + 1));
  Line found[kChunkSteps];
  for (std::int64_t panel = first_panel; panel < last_panel; panel += kMovedPanels) {
    read_band(move, panel, held.data() + 1);
    for (std::int64_t step = 0; step < steps; step += kChunkSteps) {
      const std::int64_t count = std::min(kChunkSteps, steps - step);
      gather(held.data() + 1, move.columns + step * codes, count, found);
      write_band(move, panel, step, count, found);
    }
  }
}

}  // namespace

void move_words(const WordMove& move, std::int64_t first_panel, std::int64_t last_panel) {
  if (move.columns == nullptr)
    for (std::int64_t panel = first_panel; panel < last_panel; panel += kMovedPanels) copy_band(move, panel);
  else
    move_columns(move, first_panel, last_panel);
#if QQ_X86
  _mm_sfence();  // what went past the caches becomes visible to other threads
#endif
}

}  // namespace qquant
