// Products with packed weights for AVX2: the registers; what is done with them is linear_pairs.h.

#include "isa.h"

#if QQ_X86

#define QQ_PAIRS QQ_AVX2

namespace qquant {

namespace {

struct Vector {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;  // two registers each, and those of the weights and a code: all 16

  QQ_AVX2 QQ_INLINE static Int load(const void* from) { return _mm256_loadu_si256(static_cast<const Int*>(from)); }
  QQ_AVX2 QQ_INLINE static void store(void* to, Int x) { _mm256_storeu_si256(static_cast<Int*>(to), x); }
  QQ_AVX2 QQ_INLINE static Int all(int x) { return _mm256_set1_epi32(x); }
  QQ_AVX2 QQ_INLINE static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  QQ_AVX2 QQ_INLINE static Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  QQ_AVX2 QQ_INLINE static Int times(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  QQ_AVX2 QQ_INLINE static Int madd(Int a, Int b) { return _mm256_madd_epi16(a, b); }
  QQ_AVX2 QQ_INLINE static Int shifted(Int x, int by) { return _mm256_srli_epi16(x, by); }
  QQ_AVX2 QQ_INLINE static Int masked(Int x, short mask) { return _mm256_and_si256(x, _mm256_set1_epi16(mask)); }
  QQ_AVX2 QQ_INLINE static Float real(Int x) { return _mm256_cvtepi32_ps(x); }
  QQ_AVX2 QQ_INLINE static Float load_real(const float* from) { return _mm256_loadu_ps(from); }
  QQ_AVX2 QQ_INLINE static void store_real(float* to, Float x) { _mm256_storeu_ps(to, x); }
  QQ_AVX2 QQ_INLINE static Float all_real(float x) { return _mm256_set1_ps(x); }
  QQ_AVX2 QQ_INLINE static Float times_real(Float a, Float b) { return _mm256_mul_ps(a, b); }
  QQ_AVX2 QQ_INLINE static Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

}  // namespace qquant

#include "linear_pairs.h"

namespace qquant {

const LinearKernels kLinearAvx2 = {workspace_bytes, any_grain, encode, any_grain, multiply};

}  // namespace qquant

#endif
