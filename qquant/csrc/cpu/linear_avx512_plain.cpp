// Products with packed weights for AVX-512 without VNNI: the registers; what is done with them is linear_pairs.h.

#include "isa.h"

#if QQ_X86

#define QQ_PAIRS QQ_AVX512_PLAIN

namespace qquant {

namespace {

struct Vector {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 12;

  QQ_AVX512_PLAIN QQ_INLINE static Int load(const void* from) { return _mm512_loadu_si512(from); }
  QQ_AVX512_PLAIN QQ_INLINE static void store(void* to, Int x) { _mm512_storeu_si512(to, x); }
  QQ_AVX512_PLAIN QQ_INLINE static Int all(int x) { return _mm512_set1_epi32(x); }
  QQ_AVX512_PLAIN QQ_INLINE static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  QQ_AVX512_PLAIN QQ_INLINE static Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  QQ_AVX512_PLAIN QQ_INLINE static Int times(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  QQ_AVX512_PLAIN QQ_INLINE static Int madd(Int a, Int b) { return _mm512_madd_epi16(a, b); }
  QQ_AVX512_PLAIN QQ_INLINE static Int shifted(Int x, int by) { return _mm512_srli_epi16(x, by); }
  QQ_AVX512_PLAIN QQ_INLINE static Int masked(Int x, short mask) {
    return _mm512_and_si512(x, _mm512_set1_epi16(mask));
  }
  QQ_AVX512_PLAIN QQ_INLINE static Float real(Int x) { return _mm512_cvtepi32_ps(x); }
  QQ_AVX512_PLAIN QQ_INLINE static Float load_real(const float* from) { return _mm512_loadu_ps(from); }
  QQ_AVX512_PLAIN QQ_INLINE static void store_real(float* to, Float x) { _mm512_storeu_ps(to, x); }
  QQ_AVX512_PLAIN QQ_INLINE static Float all_real(float x) { return _mm512_set1_ps(x); }
  QQ_AVX512_PLAIN QQ_INLINE static Float times_real(Float a, Float b) { return _mm512_mul_ps(a, b); }
  QQ_AVX512_PLAIN QQ_INLINE static Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

}  // namespace qquant

#include "linear_pairs.h"

namespace qquant {

const LinearKernels kLinearAvx512Plain = {workspace_bytes, any_grain, encode, any_grain, multiply};

}  // namespace qquant

#endif
