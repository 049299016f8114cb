// What layer_step.h computes, of numbers that come in and to where they are compared: with neither torch nor Python.
//
//   between_harness heads size <in >out
//
// In: two times heads * size bfloat16, a and b. Out: silu(a) * b; a + b; a as heads turned by cos b[0..size) and
// sin b[size..2 size). The instruction set is written to stderr.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "isa.h"
#include "layer_step.h"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const long heads = std::atol(argv[1]), size = std::atol(argv[2]), count = heads * size;
  using Numbers = std::vector<std::uint16_t>;
  Numbers a(std::size_t(count), 0), b(std::size_t(count), 0);
  for (Numbers* const one : {&a, &b})
    if (std::fread(one->data(), 2, one->size(), stdin) != one->size()) return 3;
  Numbers product(std::size_t(count), 0), sum = a, turned = a;
  qquant::silu_product(a.data(), b.data(), product.data(), count);
  qquant::add_to(sum.data(), b.data(), count);
  qquant::rotate(turned.data(), b.data(), b.data() + size, heads, size);
  for (const Numbers* const one : {&product, &sum, &turned})
    if (std::fwrite(one->data(), 2, one->size(), stdout) != one->size()) return 4;
  std::fputs(qquant::name_of(qquant::isa()), stderr);
  return 0;
}
