// The kernel behind words_to_panels and panels_to_words against one code at a time, with neither torch nor Python, so
// that sanitizers see every byte. It checks the kernel of the instruction set that isa() names and prints that name.
//
//   pack_harness [cases [seed]]

#include <cstdio>
#include <cstdlib>
#include <random>

#include "exact.h"
#include "isa.h"
#include "pack_panels.h"

namespace {

using namespace qquant;
using exact::Exact;
using Random = std::mt19937_64;

std::int64_t pick(Random& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

std::int64_t panels_of(std::int64_t outputs) { return (outputs + 15) / 16; }

WordPlaces places_of(bool panels, std::int64_t steps, std::int64_t outputs, std::int64_t gap) {
  if (panels) return {steps, 16, 16 * steps, panels_of(outputs) * 16};
  return {steps, outputs + gap, 16, outputs};
}

// Up to the last word that has a place, so that nothing lies behind it.
std::int64_t count_of(const WordPlaces& places) {
  const std::int64_t last = places.outputs - 1;
  return places.steps == 0 ? 0 : last / 16 * places.panel + (places.steps - 1) * places.step + last % 16 + 1;
}

std::int64_t place_of(const WordPlaces& places, std::int64_t step, std::int64_t output) {
  return output / 16 * places.panel + step * places.step + output % 16;
}

bool moves_rightly(Random& random) {
  const int bits = pick(random, 0, 1) == 0 ? 4 : 8;
  const std::int64_t codes = 32 / bits, outputs = pick(random, 1, 200), from_steps = pick(random, 1, 40);
  const bool sorted = pick(random, 0, 3) > 0, inwards = pick(random, 0, 1) == 0;
  const std::int64_t to_steps = sorted ? pick(random, 0, 40) : from_steps;
  const WordPlaces source = places_of(!inwards, from_steps, outputs, pick(random, 0, 3));
  const WordPlaces target = places_of(inwards, to_steps, outputs, 0);
  Exact<std::uint32_t> from(count_of(source), pick(random, 0, 5)), to(count_of(target), pick(random, 0, 1) * 3);
  for (std::int64_t i = 0; i < from.count(); ++i) from[i] = std::uint32_t(random());
  Exact<std::int32_t> columns(sorted ? to_steps * codes : 0);
  for (std::int64_t i = 0; i < columns.count(); ++i)
    columns[i] = std::int32_t(pick(random, -1, from_steps * codes - 1));

  const WordMove move{from.data(), source, to.data(), target, sorted ? columns.data() : nullptr, bits};
  const std::int64_t panels = panels_of(outputs);
  const std::int64_t split = pick(random, 0, panels / kMovedPanels) * kMovedPanels;
  move_words(move, 0, split);
  move_words(move, split, panels);
  for (std::int64_t output = 0; output < target.outputs; ++output)
    for (std::int64_t step = 0; step < to_steps; ++step)
      for (std::int64_t i = 0; i < codes; ++i) {
        const std::int64_t at = step * codes + i, column = sorted ? columns[at] : at;
        std::uint32_t expected = 0;
        if (column >= 0 && output < source.outputs)
          expected = from[place_of(source, column / codes, output)] >> column % codes * bits & ((1u << bits) - 1);
        const std::uint32_t found = to[place_of(target, step, output)] >> i * bits & ((1u << bits) - 1);
        if (found == expected) continue;
        std::printf("output %lld, column %lld: %u, expected %u\n", static_cast<long long>(output),
                    static_cast<long long>(at), found, expected);
        return false;
      }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  for (int i = 0; i < cases; ++i)
    if (!moves_rightly(random)) return 1;
  std::printf("%s: %d cases, all right\n", name_of(isa()), cases);
  return 0;
}
