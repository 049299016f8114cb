// The kernels behind kv_append, kv_dequantize and kv_decode_attention against arithmetic in double, with neither torch
// nor Python, so that sanitizers see every byte. It checks the kernels of the instruction set that isa() names and
// prints that name. How exact they are is tests/test_kv_ops.py; here a wrong index has to show.
//
//   kv_harness [cases [seed]]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "exact.h"
#include "isa.h"
#include "kv_attention.h"
#include "kv_codes.h"

namespace {

using namespace qquant;
using exact::Exact;

struct Case {
  std::int64_t batch, heads, group, length, tokens, k_size, v_size;
  Real dtype;
  bool masked;
};

// One side of the cache, written by the kernel: [batch, heads, tokens, size].
struct Side {
  std::int64_t heads, tokens, size;
  bool right = true;
  Exact<std::uint8_t> codes;
  Exact<std::uint16_t> scale, zero;

  Side(const Case& c, std::int64_t columns, std::mt19937_64& random)
      : heads(c.heads),
        tokens(c.tokens),
        size(columns),
        codes(c.batch * heads * tokens * size),
        scale(c.batch * heads * tokens),
        zero(scale.count()) {
    std::normal_distribution<float> normal;
    const Exact<std::uint8_t> states(codes.count() * bytes_of(c.dtype));
    for (std::int64_t i = 0; i < codes.count(); ++i) store_real(states.data(), i, normal(random), c.dtype);
    code_kernels().encode(
        {states.data(), c.dtype, size, scale.count(), size, codes.data(), size, scale.data(), zero.data()});
    const Exact<std::uint8_t> back(states.count());
    code_kernels().decode(
        {codes.data(), size, scale.count(), size, scale.data(), zero.data(), back.data(), c.dtype});
    for (std::int64_t i = 0; i < codes.count(); ++i) {
      // Half a step for the code, half for the float16 zero, and the dtype: see test_kv_ops.py.
      const double got = load_real(back.data(), i, c.dtype), want = load_real(states.data(), i, c.dtype);
      if (std::fabs(got - want) > 1.01 * from_half(scale[i / size]) + 0x1p-7 * std::fabs(want)) right = false;
      if (std::fabs(value(i / size, i % size) - got) > 0x1p-7 * std::fabs(got) + 1e-6) right = false;
    }
  }


  double value(std::int64_t vector, std::int64_t column) const {
    return double(from_half(scale[vector])) * (codes[vector * size + column] - double(from_half(zero[vector])));
  }
  Codes all_codes() const { return {codes.data(), heads * tokens * size, tokens * size, size, size}; }
  Numbers numbers(const Exact<std::uint16_t>& of) const { return {of.data(), heads * tokens, tokens}; }
};

bool check(const Case& c, std::mt19937_64& random) {
  const Side keys(c, c.k_size, random), values(c, c.v_size, random);
  if (!keys.right || !values.right) return false;
  std::normal_distribution<float> normal;
  const std::int64_t query_heads = c.heads * c.group, rows = c.batch * query_heads * c.length;
  const Exact<std::uint8_t> query(rows * c.k_size * bytes_of(c.dtype));
  const Exact<std::uint8_t> out(rows * c.v_size * bytes_of(c.dtype), 0, 0xff);
  for (std::int64_t i = 0; i < rows * c.k_size; ++i) store_real(query.data(), i, normal(random), c.dtype);
  const Exact<std::uint8_t> mask(c.masked ? rows * c.tokens : 0);
  for (std::int64_t i = 0; i < mask.count(); ++i) mask[i] = random() % 4 != 0;

  Attention a{};
  a.batch = c.batch, a.kv_heads = c.heads, a.group = c.group, a.length = c.length, a.tokens = c.tokens;
  a.query = query.data(), a.out = out.data(), a.dtype = c.dtype, a.scaling = 0.25f;
  a.query_row = c.k_size, a.query_head = c.length * c.k_size, a.query_batch = query_heads * a.query_head;
  a.keys = keys.all_codes(), a.values = values.all_codes();
  a.k_scale = keys.numbers(keys.scale), a.k_zero = keys.numbers(keys.zero);
  a.v_scale = values.numbers(values.scale), a.v_zero = values.numbers(values.zero);
  a.mask = c.masked ? mask.data() : nullptr;
  a.mask_row = c.tokens, a.mask_head = c.length * c.tokens, a.mask_batch = query_heads * a.mask_head;
  const Exact<float> partial(a.splits() > 1 ? a.tasks() * a.tile_rows() * a.partial_row() : 0, 0, 0xff);
  for (std::int64_t task = a.tasks(); task-- > 0;) attend(a, attention_kernels(), task, task + 1, partial.data());
  if (a.splits() > 1) merge_splits(a, attention_kernels(), partial.data());

  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t first = row / c.length / c.group * c.tokens;  // vector of the KV head's first token
    std::vector<double> weight(std::size_t(c.tokens), 0.0);
    double total = 0.0;
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      if (c.masked ? mask[row * c.tokens + t] == 0 : t > c.tokens - c.length + row % c.length) continue;
      double score = 0.0;
      for (std::int64_t k = 0; k < c.k_size; ++k)
        score += load_real(query.data(), row * c.k_size + k, c.dtype) * keys.value(first + t, k);
      total += weight[std::size_t(t)] = std::exp(0.25 * score);
    }
    for (std::int64_t k = 0; k < c.v_size; ++k) {
      double want = 0.0;
      for (std::int64_t t = 0; t < c.tokens && total > 0.0; ++t)
        want += weight[std::size_t(t)] / total * values.value(first + t, k);
      // Values are of size 1; test_kv_ops.py derives what a kernel may be off, here the dtype's rounding and 1e-3 do.
      const double got = load_real(out.data(), row * c.v_size + k, c.dtype);
      if (!(std::fabs(got - want) <= 1e-3 + 0x1p-8 * std::fabs(want))) return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** values) {
  const long cases = count > 1 ? std::atol(values[1]) : 40;
  const std::uint64_t seed = count > 2 ? std::strtoull(values[2], nullptr, 10) : 0;
  for (long i = 0; i < cases; ++i) {
    std::mt19937_64 random(seed + std::uint64_t(i));
    const auto one_of = [&random](const std::vector<std::int64_t>& choices) {
      return choices[random() % choices.size()];
    };
    Case c{one_of({1, 2}), one_of({1, 3}),  one_of({1, 2, 7, 40}), one_of({1, 2, 5}),
           one_of({5, 64, 257, 300}), one_of({8, 24, 64, 83, 128, 256, 321}), one_of({8, 40, 64, 83, 128, 192}),
           Real(random() % 3), random() % 2 == 0};
    if (i % 10 == 9) c.batch = c.heads = c.group = c.length = 1, c.tokens = 2049 + i;  // several splits
    if (check(c, random)) continue;
    std::printf("FAILED kv: batch %ld, heads %ld, group %ld, length %ld, tokens %ld, sizes %ld and %ld, dtype %d, %s\n",
                long(c.batch), long(c.heads), long(c.group), long(c.length), long(c.tokens), long(c.k_size),
                long(c.v_size), int(c.dtype), c.masked ? "masked" : "causal");
    return 1;
  }
  std::printf("%s: %ld cases, all right\n", name_of(isa()), cases);
  return 0;
}
