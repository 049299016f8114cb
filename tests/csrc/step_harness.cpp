// The kernels behind rms_norm, decode_attention and layer_step against arithmetic in double, with neither torch nor
// Python, so that sanitizers see every byte. It checks the kernels of the instruction set that isa() names and prints that name.
//
//   step_harness [cases [seed]]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "exact.h"
#include "half.h"
#include "isa.h"
#include "layer_step.h"
#include "plain_attention.h"
#include "rms_norm.h"

namespace {

using namespace qquant;
using exact::Exact;
using Random = std::mt19937_64;

void fill(Exact<std::uint16_t>& states, std::int64_t count, Random& random) {
  std::normal_distribution<float> drawn;
  for (std::int64_t i = 0; i < count; ++i) states.data()[i] = to_bfloat16(drawn(random));
}

std::int64_t pick(Random& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

bool close(double found, double expected, double slack, const char* what, std::int64_t at) {
  if (std::abs(found - expected) <= std::abs(expected) * 0x1p-8 + slack) return true;
  std::printf("%s %lld: %g, expected %g\n", what, static_cast<long long>(at), found, expected);
  return false;
}

bool norm_case(Random& random) {
  const std::int64_t sizes[] = {1, 7, 8, 33, 896, 1000, 5120, 8200};
  const std::int64_t size = sizes[pick(random, 0, 7)], rows = pick(random, 1, 5), stride = size + pick(random, 0, 3);
  Exact<std::uint16_t> x((rows - 1) * stride + size), weight(size), out(rows * size);
  fill(x, (rows - 1) * stride + size, random);
  fill(weight, size, random);
  const RmsNorm norm{x.data(), weight.data(), out.data(), stride, size, 1e-6f};
  const std::int64_t split = pick(random, 0, rows);
  normalize(norm, 0, split);
  normalize(norm, split, rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (std::int64_t i = 0; i < size; ++i) squares += std::pow(from_bfloat16(x.data()[r * stride + i]), 2.0);
    for (std::int64_t i = 0; i < size; ++i) {
      const double inner = from_bfloat16(x.data()[r * stride + i]) / std::sqrt(squares / double(size) + 1e-6);
      const double expected = inner * from_bfloat16(weight.data()[i]);
      // One rounding of the inner part beside that of the result, and a few of float32.
      if (!close(from_bfloat16(out.data()[r * size + i]), expected, std::abs(expected) * (0x1p-8 + 0x1p-15), "norm", i))
        return false;
    }
  }
  return true;
}

bool attention_case(Random& random) {
  const std::int64_t sizes[] = {1, 5, 16, 40, 64, 80, 128, 256};
  PlainAttention p{};
  p.batch = pick(random, 1, 2), p.kv_heads = pick(random, 1, 3), p.group = pick(random, 1, 9);
  p.tokens = pick(random, 0, 70);
  p.keys.size = sizes[pick(random, 0, 7)], p.values.size = sizes[pick(random, 0, 7)];
  p.keys.token = p.keys.size + pick(random, 0, 2), p.values.token = p.values.size + pick(random, 0, 2);
  p.keys.head = p.keys.token * p.tokens, p.values.head = p.values.token * p.tokens;
  p.keys.batch = p.keys.head * p.kv_heads, p.values.batch = p.values.head * p.kv_heads;
  const std::int64_t heads = p.kv_heads * p.group;
  p.query_head = p.keys.size, p.query_batch = heads * p.keys.size;
  p.scaling = 1.0f / std::sqrt(float(p.keys.size));
  // What a view ends with: nothing behind the last element of the last token.
  const auto count = [&p](const PlainStates& states) {
    return p.tokens == 0 ? 0 : states.batch * p.batch - (states.token - states.size);
  };
  Exact<std::uint16_t> query(p.batch * p.query_batch), keys(count(p.keys)), values(count(p.values));
  Exact<std::uint16_t> out(p.batch * heads * p.values.size);
  fill(query, p.batch * p.query_batch, random);
  fill(keys, count(p.keys), random);
  fill(values, count(p.values), random);
  const bool masked = pick(random, 0, 1) == 1, per_head = pick(random, 0, 1) == 1;
  p.mask_head = per_head ? p.tokens : 0;
  p.mask_batch = p.tokens * (per_head ? heads : 1);
  Exact<std::uint8_t> mask(p.mask_batch * p.batch);
  for (std::int64_t i = 0; i < p.mask_batch * p.batch; ++i) mask.data()[i] = std::uint8_t(pick(random, 0, 2) > 0);
  p.mask = masked ? mask.data() : nullptr;
  p.query = query.data(), p.keys.data = keys.data(), p.values.data = values.data(), p.out = out.data();
  const std::int64_t split = pick(random, 0, p.tasks());
  attend_plain(p, 0, split);
  attend_plain(p, split, p.tasks());
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::uint16_t* const key = p.keys.data + b * p.keys.batch + h / p.group * p.keys.head;
      const std::uint16_t* const value = p.values.data + b * p.values.batch + h / p.group * p.values.head;
      std::vector<double> weights(std::size_t(p.tokens), 0.0);
      double total = 0;
      for (std::int64_t t = 0; t < p.tokens; ++t) {
        if (masked && p.mask[b * p.mask_batch + h * p.mask_head + t] == 0) continue;
        double score = 0;
        for (std::int64_t d = 0; d < p.keys.size; ++d)
          score += double(from_bfloat16(p.query[b * p.query_batch + h * p.query_head + d])) *
                   from_bfloat16(key[t * p.keys.token + d]);
        total += weights[std::size_t(t)] = std::exp(score * p.scaling);
      }
      for (std::int64_t d = 0; d < p.values.size; ++d) {
        double expected = 0;
        for (std::int64_t t = 0; t < p.tokens; ++t)
          expected += weights[std::size_t(t)] * from_bfloat16(value[t * p.values.token + d]);
        expected = total == 0 ? 0 : expected / total;
        // Scores of up to 256 products have errors of 2^-16, values are below 6.
        if (!close(from_bfloat16(p.out[(b * heads + h) * p.values.size + d]), expected, 6 * 0x1p-14, "attention", d))
          return false;
      }
    }
  return true;
}

// Numbers of many magnitudes, some of them at the ends of what bfloat16 holds.
void fill_widely(Exact<std::uint16_t>& states, std::int64_t count, Random& random) {
  const std::uint16_t ends[] = {0x0000, 0x8000, 0x0001, 0x807f, 0x7f80, 0xff80, 0x7fc0, 0xffff};
  std::normal_distribution<float> drawn;
  for (std::int64_t i = 0; i < count; ++i) {
    const float scale = std::pow(10.0f, float(pick(random, -4, 3)));
    states.data()[i] = pick(random, 0, 15) == 0 ? ends[pick(random, 0, 7)] : to_bfloat16(scale * drawn(random));
  }
}

// As close, and what is no finite number exactly. `parts` is the sum of the magnitudes of what was added: each of its
// terms and the sum are rounded once, and what is below 2^-125 may be lost.
bool near(std::uint16_t found, double expected, double parts, const char* what, std::int64_t at) {
  const double got = from_bfloat16(found);
  if (std::isfinite(expected)) return close(got, expected, parts * (0x1p-8 + 0x1p-15) + 0x1p-125, what, at);
  if (std::isnan(expected) ? std::isnan(got) : got == expected) return true;
  std::printf("%s %lld: %g, expected %g\n", what, static_cast<long long>(at), got, expected);
  return false;
}

bool rotation_case(Random& random) {
  const std::int64_t half = pick(random, 1, 70), size = 2 * half, heads = pick(random, 0, 4);
  Exact<std::uint16_t> states(heads * size), before(heads * size), cos(size), sin(size);
  fill_widely(before, heads * size, random);
  fill_widely(cos, size, random);
  fill_widely(sin, size, random);
  std::copy_n(before.data(), heads * size, states.data());
  rotate(states.data(), cos.data(), sin.data(), heads, size);
  for (std::int64_t i = 0; i < heads * size; ++i) {
    const std::int64_t place = i % size;
    const double other = place < half ? -from_bfloat16(before[i + half]) : from_bfloat16(before[i - half]);
    const double straight = double(from_bfloat16(before[i])) * from_bfloat16(cos[place]);
    const double across = other * from_bfloat16(sin[place]);
    if (!near(states[i], straight + across, std::abs(straight) + std::abs(across), "rotation", i)) return false;
  }
  return true;
}

bool gate_case(Random& random) {
  const std::int64_t count = pick(random, 0, 150), way = pick(random, 0, 2);
  Exact<std::uint16_t> gate(count), up(count), out(count), sum(count);
  fill_widely(gate, count, random);
  fill_widely(up, count, random);
  std::copy_n(gate.data(), count, sum.data());
  add_to(sum.data(), up.data(), count);
  Exact<std::uint16_t> first(count), second(count);
  std::copy_n(gate.data(), count, first.data());
  std::copy_n(up.data(), count, second.data());
  Exact<std::uint16_t>& found = way == 0 ? out : way == 1 ? first : second;
  silu_product(first.data(), second.data(), found.data(), count);
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = from_bfloat16(gate[i]), factor = from_bfloat16(up[i]);
    // e^89 is no float32, so that what is left of -89 is 0 and not -89 / e^89; and a denormal number may be 0.
    const double inner = value / (1.0 + std::exp(-value)), expected = inner * factor;
    const bool lost = std::abs(inner) < 0x1p-121;
    if (!lost && !near(found[i], expected, 2 * std::abs(expected), "gate", i)) return false;
    if (!near(sum[i], value + factor, std::abs(value) + std::abs(factor), "sum", i)) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  for (int i = 0; i < cases; ++i) {
    const int kind = i % 4;
    const bool right = kind == 0                                ? rotation_case(random)
                       : kind == 1                              ? gate_case(random)
                       : kind == 2 || !plain_attention_is_here() ? norm_case(random)
                                                                 : attention_case(random);
    if (!right) return 1;
  }
  std::printf("%s: %d cases, all right\n", name_of(isa()), cases);
  return 0;
}
