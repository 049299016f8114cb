// The instruction sets that kernels here are written for, and which of them to run. No kernel lives here.

#pragma once

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define QQ_X86 1
// GCC 12 warns of its own header's deliberately undefined vectors.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

// Kernels carry their instruction set themselves: the module is compiled for any processor of the architecture.
#define QQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define QQ_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define QQ_AVX512_BF16 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))
#define QQ_AVX512_PLAIN __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define QQ_INLINE inline __attribute__((always_inline))
#else
#define QQ_X86 0
#endif

namespace qquant {

// Each has all that those before it have. A kernel that is not written for one runs as for the last before it.
enum class Isa { portable, avx2, avx512, avx512_vnni, avx512_bf16 };

// The best one that this processor has and the environment variable QQUANT_CPU_ISA allows: the name of an
// instruction set as name_of gives it. Read once. Throws std::runtime_error on any other value.
Isa isa();

const char* name_of(Isa isa);

}  // namespace qquant
