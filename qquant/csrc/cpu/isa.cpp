// Which instruction set the kernels run with, asked once. No kernel lives here.

#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace qquant {

namespace {

Isa best_here() {
#if QQ_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512_vnni;
#else
  return Isa::portable;
#endif
}

Isa allowed() {
  const char* raw = std::getenv("QQUANT_CPU_ISA");
  const std::string value = raw == nullptr ? "" : raw;
  if (value.empty()) return Isa::avx512_bf16;
  std::string names;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16}) {
    if (value == name_of(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw std::runtime_error("QQUANT_CPU_ISA must be one of " + names + ", got '" + value +
                           "'; unset it to let the processor decide");
}

}  // namespace

Isa isa() {
  static const Isa chosen = std::min(best_here(), allowed());
  return chosen;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace qquant
