// The kernels behind dense_linear against arithmetic in double, with neither torch nor Python, so that sanitizers see
// every byte. It checks the kernel of the instruction set that isa() names and prints that name.
//
//   dense_harness [cases [seed]]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "dense.h"
#include "exact.h"
#include "isa.h"

namespace {

using namespace qquant;
using exact::Exact;

struct Case {
  std::int64_t tokens, rows, columns, more_stride, skip;
  int bias;  // 0: none, else one more than its dtype
};

// Results of rows computed in ranges of `grain`, the last first, every buffer holding `fill` before.
Exact<std::uint16_t> run(const Case& c, const Exact<std::uint16_t>& x, const Exact<std::uint16_t>& weight,
                         const Exact<std::uint8_t>& bias, std::int64_t first_token, std::int64_t tokens,
                         std::int64_t grain, int fill) {
  const std::int64_t lines = (c.columns + kDenseLine - 1) / kDenseLine;
  const Exact<std::uint16_t> packed(lines * tokens * kDenseLine, 0, fill);
  Exact<std::uint16_t> out(tokens * c.rows, 0, fill);
  pack_lines(x.data() + first_token * c.columns, tokens, c.columns, c.columns, packed.data());
  const Dense problem{packed.data(), tokens,
                      weight.data(), c.rows,
                      c.columns,     c.columns + c.more_stride,
                      c.bias == 0 ? nullptr : bias.data(), Real(std::max(0, c.bias - 1)),
                      out.data()};
  for (std::int64_t begin = (c.rows - 1) / grain * grain; begin >= 0; begin -= grain)
    dense_kernel()(problem, begin, std::min(begin + grain, c.rows));
  return out;
}

bool check(const Case& c, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  const std::int64_t stride = c.columns + c.more_stride;
  const Exact<std::uint16_t> x(c.tokens * c.columns), weight((c.rows - 1) * stride + c.columns, c.skip);
  for (std::int64_t i = 0; i < x.count(); ++i) x[i] = to_bfloat16(normal(random));
  for (std::int64_t i = 0; i < weight.count(); ++i) weight[i] = to_bfloat16(normal(random));
  const Real dtype = Real(std::max(0, c.bias - 1));
  const Exact<std::uint8_t> bias(c.bias == 0 ? 0 : c.rows * bytes_of(dtype));
  for (std::int64_t i = 0; c.bias != 0 && i < c.rows; ++i) store_real(bias.data(), i, normal(random), dtype);

  const Exact<std::uint16_t> all = run(c, x, weight, bias, 0, c.tokens, c.rows, 0x00);
  for (std::int64_t token = 0; token < c.tokens; ++token)
    for (std::int64_t row = 0; row < c.rows; ++row) {
      double want = 0.0, magnitude = 0.0;
      for (std::int64_t k = 0; k < c.columns; ++k) {
        const double term = double(from_bfloat16(x[token * c.columns + k])) * from_bfloat16(weight[row * stride + k]);
        want += term;
        magnitude += std::fabs(term);
      }
      if (c.bias != 0) want += load_real(bias.data(), row, dtype);
      // Each column is added in float32, and so is the bias; one rounding to bfloat16. Denormal sums become 0.
      const double sums = 0x1p-24 * double(c.columns + 2) * (magnitude + std::fabs(want)) + 0x1p-126;
      const double got = from_bfloat16(all[token * c.rows + row]);
      if (!(std::fabs(got - want) <= 1.001 * (sums + 0x1p-8 * std::fabs(want)))) return false;
    }
  if (!all.same(run(c, x, weight, bias, 0, c.tokens, 1, 0xff))) return false;
  if (!all.same(run(c, x, weight, bias, 0, c.tokens, 5, 0xff))) return false;
  for (std::int64_t token = 0; token < c.tokens; ++token) {
    const Exact<std::uint16_t> alone = run(c, x, weight, bias, token, 1, c.rows, 0xff);
    if (!std::equal(alone.data(), alone.data() + c.rows, all.data() + token * c.rows)) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** values) {
  const long cases = count > 1 ? std::atol(values[1]) : 100;
  const std::uint64_t seed = count > 2 ? std::strtoull(values[2], nullptr, 10) : 0;
  for (long i = 0; i < cases; ++i) {
    std::mt19937_64 random(seed + std::uint64_t(i));
    const Case c{1 + i % kDenseTokens,
                 1 + std::int64_t(random() % 40),
                 1 + std::int64_t(random() % 300),
                 std::int64_t(random() % 3),
                 std::int64_t(random() % 3),
                 int(random() % 4)};
    if (check(c, random)) continue;
    std::printf("FAILED dense: tokens %ld, rows %ld, columns %ld, more stride %ld, skip %ld, bias %d\n", long(c.tokens),
                long(c.rows), long(c.columns), long(c.more_stride), long(c.skip), c.bias);
    return 1;
  }
  std::printf("%s: %ld cases, all right\n", name_of(isa()), cases);
  return 0;
}
