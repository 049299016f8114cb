// The kernels behind panel_linear and panel_weights against arithmetic in double, with neither torch nor Python, so
// that sanitizers see every byte. It checks the kernels of the instruction set that isa() names and prints that name.
//
//   linear_harness [cases [seed]]
//
// Nothing of the kernels' own arithmetic is used here: codes are cut from words by division, steps are found with
// frexp.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "exact.h"
#include "isa.h"
#include "linear.h"
#include "linear_weights.h"

namespace {

using namespace qquant;
using exact::Exact;

// What the values of x are like.
enum class Values { plain, with_zero_rows, tiny, huge, not_finite };

struct Case {
  int bits = 4, activation_bits = 16;
  std::int64_t group = 128, columns = 256, tokens = 1, stride_more = 0, skip = 0;
  std::vector<std::int64_t> widths = {32};
  Real dtype = Real::bfloat16;
  Values values = Values::plain;
  bool half_scales = true, zeros = false, order = false, bias = false;
  bool sparse = false;  // one column of a row is not 0, so that its rounding shows

  std::string text() const {
    std::string all;
    for (const std::int64_t width : widths) all += (all.empty() ? "" : "+") + std::to_string(width);
    std::string found = "widths " + all;
    const auto add = [&found](const char* name, std::int64_t number) {
      found += std::string(", ") + name + " " + std::to_string(number);
    };
    add("bits", bits), add("group", group), add("columns", columns), add("tokens", tokens), add("dtype", int(dtype));
    add("activation bits", activation_bits), add("values", int(values)), add("half scales", half_scales);
    add("zeros", zeros), add("order", order), add("bias", bias), add("sparse", sparse);
    add("more stride", stride_more), add("skip", skip);
    return found;
  }
};

// The tensors of a case.
struct Tensors {
  const Case& c;
  std::int64_t panels = 0, steps, groups, features;
  Exact<std::uint32_t> words{0};
  Exact<std::uint16_t> half_scales{0};
  Exact<float> scales{0}, bias{0};
  Exact<std::uint8_t> zeros{0}, x{0};
  Exact<std::int32_t> order{0};
  std::int32_t zero;

  Tensors(const Case& given, std::mt19937_64& random) : c(given) {
    for (const std::int64_t width : c.widths) panels += (width + 15) / 16;
    steps = c.columns * c.bits / 32;
    groups = (c.columns + c.group - 1) / c.group;
    fill_numbers(random);
    fill_words(random);
    fill_order(random);
    fill_x(random);
  }

  std::int64_t stride() const { return features + c.stride_more; }

  double value(std::int64_t token, std::int64_t column) const {
    const std::int64_t from = c.order ? order[column] : column;
    return from < 0 ? 0.0 : double(load_real(x.data(), token * stride() + from, c.dtype));
  }
  int code(std::int64_t row, std::int64_t column) const {
    const std::int64_t per = 32 / c.bits;
    std::uint32_t word = words[(row / 16 * steps + column / per) * 16 + row % 16];
    for (std::int64_t i = 0; i < column % per; ++i) word /= 1u << c.bits;
    return int(word % (1u << c.bits)) - zero_at(row, column);
  }
  double scale(std::int64_t row, std::int64_t column) const {
    const std::int64_t at = number(row, column);
    return c.half_scales ? double(from_half(half_scales[at])) : double(scales[at]);
  }

 private:
  std::int64_t number(std::int64_t row, std::int64_t column) const {
    return (row / 16 * groups + column / c.group) * 16 + row % 16;
  }
  int zero_at(std::int64_t row, std::int64_t column) const { return c.zeros ? zeros[number(row, column)] : zero; }

  void fill_numbers(std::mt19937_64& random) {
    std::uniform_real_distribution<float> share(0.5f, 1.5f);
    const std::int64_t count = panels * groups * 16;
    half_scales = Exact<std::uint16_t>(c.half_scales ? count : 0);
    scales = Exact<float>(c.half_scales ? 0 : count);
    zeros = Exact<std::uint8_t>(c.zeros ? count : 0);
    for (std::int64_t i = 0; i < count; ++i) {
      const float scale = share(random) * 0x1p-12f * (i % 7 == 0 ? -1.0f : 1.0f);
      if (c.half_scales)
        half_scales[i] = to_half(scale);
      else
        scales[i] = scale;
      if (c.zeros) zeros[i] = std::uint8_t(random() % (c.bits == 4 ? 17 : 256));
    }
    zero = c.zeros ? 0 : random() % 2 == 0 ? 1 << (c.bits - 1) : std::int32_t(random() % (c.bits == 4 ? 17 : 257));
    bias = Exact<float>(c.bias ? panels * 16 : 0);
    for (std::int64_t i = 0; i < bias.count(); ++i) bias[i] = share(random) - 1.0f;
  }

  void fill_words(std::mt19937_64& random) {
    words = Exact<std::uint32_t>(panels * steps * 16);
    for (std::int64_t i = 0; i < words.count(); ++i) words[i] = std::uint32_t(random());
    if (!c.sparse) return;
    zero = std::min(zero, (1 << c.bits) - 1);
    for (std::int64_t i = 0; i < words.count(); ++i) {
      const std::int64_t row = i / (steps * 16) * 16 + i % 16, step = i / 16 % steps, per = 32 / c.bits;
      std::uint32_t word = 0;
      for (std::int64_t k = per; k-- > 0;) {
        const bool kept = step * per + k == row % c.columns;
        word = (word << c.bits) | (kept ? words[i] >> (32 - c.bits) : std::uint32_t(zero));
      }
      words[i] = word;
    }
  }

  void fill_order(std::mt19937_64& random) {
    features = c.columns;
    order = Exact<std::int32_t>(c.order ? c.columns : 0);
    if (!c.order) return;
    // Some of the columns multiply nothing, and some of x is not asked for.
    for (std::int64_t i = 0; i < c.columns; ++i) order[i] = random() % 8 == 0 ? -1 : std::int32_t(i);
    for (std::int64_t i = c.columns - 1; i > 0; --i) std::swap(order[i], order[std::int64_t(random() % (i + 1))]);
    features = 1;
    for (std::int64_t i = 0; i < c.columns; ++i) features = std::max<std::int64_t>(features, order[i] + 1);
  }

  void fill_x(std::mt19937_64& random) {
    std::normal_distribution<float> normal;
    const std::int64_t bytes = bytes_of(c.dtype), count = c.tokens == 0 ? 0 : (c.tokens - 1) * stride() + features;
    x = Exact<std::uint8_t>(count * bytes, c.skip * bytes);
    const bool wide = c.dtype != Real::float16;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t token = i / stride();
      float value = normal(random) * (i % 37 == 0 ? 30.0f : 1.0f);
      if (c.values == Values::with_zero_rows && token % 2 == 0) value = random() % 2 == 0 ? 0.0f : -0.0f;
      if (c.values == Values::tiny) value *= wide ? (token % 2 == 0 ? 0x1p-130f : 0x1p-118f) : 0x1p-20f;
      if (c.values == Values::huge)
        value = std::copysign(std::fmin(std::fabs(value), 50.0f), value) * (wide ? 0x1p118f : 1000.0f);
      if (c.values == Values::not_finite && token % 3 == 1 && i % stride() == token % features)
        value = token % 2 == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
      store_real(x.data(), i, value, c.dtype);
    }
  }
};

// The results of a case, one block for each slice.
std::vector<Exact<std::uint8_t>> results_of(const Case& c, std::int64_t tokens, int fill) {
  std::vector<Exact<std::uint8_t>> out;
  for (const std::int64_t width : c.widths) out.emplace_back(tokens * width * bytes_of(c.dtype), 0, fill);
  return out;
}

// Runs tokens `first` to `first + count` of a case in ranges of `token_grains` and `panel_grains` grains (0: all at
// once), the last range first, with every buffer holding `fill` before.
std::vector<Exact<std::uint8_t>> run(const LinearKernels& kernels, const Tensors& t, std::int64_t first,
                                     std::int64_t count, std::int64_t token_grains, std::int64_t panel_grains,
                                     int fill) {
  const Case& c = t.c;
  std::vector<Exact<std::uint8_t>> out = results_of(c, count, fill);
  const Exact<Slice> slices(std::int64_t(out.size()));
  std::int64_t panel = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    slices[std::int64_t(i)] = {out[i].data(), panel, c.widths[i]};
    panel += (c.widths[i] + 15) / 16;
  }
  Linear problem{};
  problem.weight.words = t.words.data();
  problem.weight.scales = c.half_scales ? static_cast<const void*>(t.half_scales.data()) : t.scales.data();
  problem.weight.half_scales = c.half_scales;
  problem.weight.zeros = c.zeros ? t.zeros.data() : nullptr;
  problem.weight.zero = t.zero;
  problem.weight.bits = c.bits;
  problem.weight.panels = t.panels;
  problem.weight.steps = t.steps;
  problem.weight.groups = t.groups;
  problem.weight.group = c.group;
  problem.x = t.x.data() + first * t.stride() * bytes_of(c.dtype);
  problem.dtype = c.dtype;
  problem.tokens = count;
  problem.stride = t.stride();
  problem.order = c.order ? t.order.data() : nullptr;
  problem.bias = c.bias ? t.bias.data() : nullptr;
  problem.activation_bits = c.activation_bits;
  problem.slices = slices.data();
  problem.slice_count = slices.count();
  const Exact<std::uint8_t> workspace(kernels.workspace_bytes(problem), 0, fill);
  const auto each_range = [](std::int64_t end, std::int64_t grain, const auto& call) {
    for (std::int64_t begin = (end - 1) / grain * grain; begin >= 0; begin -= grain)
      call(begin, std::min(begin + grain, end));
  };
  const auto grain_of = [](std::int64_t grains, std::int64_t grain, std::int64_t all) {
    return grains == 0 ? std::max<std::int64_t>(all, 1) : grains * grain;
  };
  each_range(count, grain_of(token_grains, kernels.token_grain(problem), count),
             [&](std::int64_t begin, std::int64_t end) { kernels.encode(problem, begin, end, workspace.data()); });
  each_range(t.panels, grain_of(panel_grains, kernels.panel_grain(problem), t.panels),
             [&](std::int64_t begin, std::int64_t end) { kernels.multiply(problem, workspace.data(), begin, end); });
  return out;
}

constexpr double kUnit = 0x1p-24;     // half the last place of float32, relative
constexpr double kLeast = 0x1p-149;   // the smallest float32

struct Expected {
  double value, bound;
  bool finite, fits;  // all of x is; float32 and the dtype hold what leads to the result
};

// The least power of two at least `largest` / limit, for 8 bits `largest` / 127 itself.
double step_at_most(double largest, int activation_bits) {
  if (activation_bits == 8) return largest / 127.0;
  const double limit = activation_bits == 16 ? 32639.0 : 8355711.0;
  int exponent = 0;
  const double fraction = std::frexp(largest / limit, &exponent);
  return std::fmax(std::ldexp(1.0, fraction == 0.5 ? exponent - 1 : exponent), 0x1p-126);
}

// One element of the result in double, and how far a kernel may be from it, each of these as its worst case.
Expected expect(const Tensors& t, std::int64_t token, std::int64_t row, bool tile) {
  const Case& c = t.c;
  Expected out{0.0, 0.0, true, true};
  double magnitude = 0.0;
  std::int64_t blocks = 0;
  for (std::int64_t begin = 0; begin < c.columns;) {
    const std::int64_t end = std::min({begin + 128, (begin / c.group + 1) * c.group, c.columns});
    double largest = 0.0, weights = 0.0, values = 0.0;
    for (std::int64_t k = begin; k < end; ++k) {
      const double x = t.value(token, k), exact = t.scale(row, k) * t.code(row, k);
      const double weight = tile ? from_bfloat16(to_bfloat16(float(exact))) : exact;  // as tiles have it
      if (!std::isfinite(x)) out.finite = false;
      largest = std::fmax(largest, std::fabs(x));
      out.value += x * weight;
      magnitude += std::fabs(x * weight);
      weights += std::fabs(weight);
      values += std::fabs(x);
    }
    const double scale = std::fabs(t.scale(row, begin));
    if (tile) {
      // bfloat16 instructions take denormals for 0, and give 0 for them: x, weights, products, sums, and the result.
      out.bound += 0x1p-126 * (weights + values + 2.0 * double(end - begin) + 1.0);
    } else {
      const double limit = c.activation_bits == 8 ? 127.0 : c.activation_bits == 16 ? 32639.0 : 8355711.0;
      // Half a step, and roundings of the quotients x / step and largest / limit, at most `limit` each; the step of 8
      // bits may itself be denormal.
      const double step = step_at_most(largest, c.activation_bits);
      const double part = (0.5 + 2.0 * limit * kUnit) * step + 127.0 * kLeast;
      out.bound += part * weights;
      magnitude += part * weights;
      // The sum of a second plane is below 2^22 and rounded with the first; step * scale may be denormal.
      out.bound += kUnit * 0x1p22 * step * scale * (c.activation_bits == 24 ? 1.0 : 0.0);
      out.bound += kLeast * (128.0 * 256.0 * limit + 1.0);
    }
    ++blocks;
    begin = end;
  }
  // A block's float32 sum, step, scale and their products: six roundings of at most the sum of magnitudes; one for each
  // block added. Tiles add every column in float32, and stretches of them, fewer than blocks.
  out.bound += kUnit * double(6 + blocks + (tile ? c.columns : 0)) * magnitude;
  if (c.bias) {
    const double bias = t.bias[row];
    out.value += bias;
    out.bound += kUnit * (std::fabs(bias) + magnitude);
  }
  const double unit = c.dtype == Real::float32 ? 0.0 : c.dtype == Real::float16 ? 0x1p-11 : 0x1p-8;
  out.bound += unit * (std::fabs(out.value) + out.bound) + (c.dtype == Real::float16 ? 0x1p-25 : 0x1p-134);
  out.bound *= 1.001;  // products of two errors
  out.fits = std::fabs(out.value) + out.bound <= (c.dtype == Real::float16 ? 65504.0 : 3.38e38);
  if (tile) out.fits = out.fits && 1.01 * magnitude <= 3.38e38;  // no sum on the way is larger
  return out;
}

int failures = 0;

void fail(const char* kernel, const Case& c, const std::string& what) {
  std::printf("FAILED %s: %s: %s\n", kernel, what.c_str(), c.text().c_str());
  if (++failures >= 10) std::exit(1);
}

void check_values(const char* name, const Tensors& t, const std::vector<Exact<std::uint8_t>>& out, bool tile) {
  const Case& c = t.c;
  std::int64_t first_row = 0;
  for (std::size_t s = 0; s < out.size(); first_row += (c.widths[s] + 15) / 16 * 16, ++s)
    for (std::int64_t token = 0; token < c.tokens; ++token)
      for (std::int64_t i = 0; i < c.widths[s]; ++i) {
        const double got = load_real(out[s].data(), token * c.widths[s] + i, c.dtype);
        const Expected want = expect(t, token, first_row + i, tile);
        // What is not finite in a row shows in all its results; fixed point makes it NaN.
        const bool right = want.finite ? !want.fits || std::fabs(got - want.value) <= want.bound
                                       : (tile ? !std::isfinite(got) : std::isnan(got));
        if (right) continue;
        return fail(name, c, "slice " + std::to_string(s) + " token " + std::to_string(token) + " feature " +
                                 std::to_string(i) + " is " + std::to_string(got) + ", not " +
                                 std::to_string(want.value) + " within " + std::to_string(want.bound));
      }
}

void check_same(const char* name, const Case& c, const std::vector<Exact<std::uint8_t>>& all, std::int64_t first,
                const std::vector<Exact<std::uint8_t>>& part, std::int64_t count, const char* what) {
  for (std::size_t s = 0; s < all.size(); ++s) {
    const std::int64_t row = c.widths[s] * bytes_of(c.dtype);
    if (std::memcmp(all[s].data() + first * row, part[s].data(), std::size_t(count * row)) != 0)
      return fail(name, c, std::string("other bits ") + what);
  }
}

void check_linear(const char* name, const LinearKernels& kernels, const Case& c, std::uint64_t seed, bool tile) {
  std::mt19937_64 random(seed);
  const Tensors t(c, random);
  const auto all = run(kernels, t, 0, c.tokens, 0, 0, 0x00);
  check_values(name, t, all, tile);
  // Ones are NaN as float32, so what is read without having been written shows.
  check_same(name, c, all, 0, run(kernels, t, 0, c.tokens, 1, 1, 0xff), c.tokens, "in single ranges");
  check_same(name, c, all, 0, run(kernels, t, 0, c.tokens, 3, 2, 0xff), c.tokens, "in ranges of several");
  const std::int64_t first = std::int64_t(random() % std::uint64_t(c.tokens));
  const std::int64_t count = 1 + std::int64_t(random() % std::uint64_t(c.tokens - first));
  check_same(name, c, all, first, run(kernels, t, first, count, 0, 0, 0xff), count, "with other tokens");
  check_same(name, c, all, first, run(kernels, t, first, 1, 0, 0, 0xff), 1, "for one token");
}

void check_weights(const Case& c, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const Tensors t(c, random);
  Panels weight{};
  weight.words = t.words.data();
  weight.scales = c.half_scales ? static_cast<const void*>(t.half_scales.data()) : t.scales.data();
  weight.half_scales = c.half_scales;
  weight.zeros = c.zeros ? t.zeros.data() : nullptr;
  weight.zero = t.zero;
  weight.bits = c.bits;
  weight.panels = t.panels;
  weight.steps = t.steps;
  weight.groups = t.groups;
  weight.group = c.group;
  const Exact<std::uint8_t> want(t.panels * 16 * c.columns * bytes_of(c.dtype), 0, 0), got(want.count(), 0, 0xff);
  for (std::int64_t row = 0; row < t.panels * 16; ++row)
    for (std::int64_t k = 0; k < c.columns; ++k)
      store_real(want.data(), row * c.columns + k, float(t.scale(row, k)) * float(t.code(row, k)), c.dtype);
  for (std::int64_t panel = t.panels; panel-- > 0;) unpack_weights(weight, got.data(), c.dtype, panel, panel + 1);
  if (!want.same(got)) fail("weights", c, "other bits");
  unpack_weights(weight, got.data(), c.dtype, 0, t.panels);
  if (!want.same(got)) fail("weights", c, "other bits at once");
}

template <class T>
T one_of(std::mt19937_64& random, const std::vector<T>& choices) {
  return choices[random() % choices.size()];
}

Case some_case(std::mt19937_64& random, std::int64_t tokens) {
  Case c;
  c.bits = one_of<int>(random, {4, 8});
  const std::int64_t per = 32 / c.bits;
  c.columns = per * (1 + std::int64_t(random() % (tokens > 32 ? 40 : 80)));
  c.group = one_of<std::int64_t>(random, {per, 8, 16, 24, 32, 64, 72, 128, 136, 160, 256, 320, c.columns});
  c.tokens = tokens;
  c.widths.clear();
  for (std::int64_t slices = 1 + std::int64_t(random() % 3), panels = 9; slices > 0 && panels > 0; --slices) {
    const std::int64_t most = 16 * std::min<std::int64_t>(panels, tokens > 32 ? 2 : 4);
    c.widths.push_back(1 + std::int64_t(random() % std::uint64_t(most)));
    if (random() % 2 == 0) c.widths.back() = (c.widths.back() + 15) / 16 * 16;
    panels -= (c.widths.back() + 15) / 16;
  }
  c.dtype = one_of<Real>(random, {Real::float32, Real::float16, Real::bfloat16});
  c.activation_bits = one_of<int>(random, {8, 16, 24, c.dtype == Real::float32 ? 24 : 16});
  c.values = one_of<Values>(random, {Values::plain, Values::plain, Values::plain, Values::with_zero_rows, Values::tiny,
                                     Values::huge, Values::not_finite});
  c.half_scales = random() % 2 == 0;
  c.zeros = random() % 2 == 0;
  c.sparse = !c.zeros && random() % 2 == 0;
  c.order = random() % 3 == 0;
  c.bias = random() % 2 == 0;
  c.stride_more = one_of<std::int64_t>(random, {0, 1, 3, 16});
  c.skip = one_of<std::int64_t>(random, {0, 1, 5});
  return c;
}

}  // namespace

int main(int count, char** values) {
  const long cases = count > 1 ? std::atol(values[1]) : 200;
  const std::uint64_t seed = count > 2 ? std::strtoull(values[2], nullptr, 10) : 0;
  const std::vector<std::int64_t> tokens = {1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 31, 33, 64, 100};
  const LinearKernels& kernels = linear_kernels();
  const LinearKernels* const tiles = tile_kernels();
  for (long i = 0; i < cases; ++i) {
    const std::uint64_t own = seed + std::uint64_t(i);
    std::mt19937_64 random(own);
    Case c = some_case(random, tokens[std::size_t(i) % tokens.size()]);
    check_linear("linear", kernels, c, own, false);
    if (c.tokens <= 3) check_weights(c, own);
    if (tiles == nullptr) continue;
    c.dtype = Real::bfloat16;
    check_linear("tile", *tiles, c, own, true);
  }
  std::printf("%s: %ld cases, %s\n", name_of(isa()), cases, failures == 0 ? "all right" : "failed");
  return failures == 0 ? 0 : 1;
}
