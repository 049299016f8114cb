// 16 x 16 numbers of 32 bits turned in registers, for kernels that need rows where memory holds columns.

#pragma once

#include "isa.h"

#if QQ_X86

namespace qquant {

// x[i] was row i and becomes column i.
QQ_AVX512_PLAIN QQ_INLINE void transpose(__m512i x[16]) {
  __m512i y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(a, c);
    y[i + 1] = _mm512_unpackhi_epi64(a, c);
    y[i + 2] = _mm512_unpacklo_epi64(b, d);
    y[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i a = _mm512_shuffle_i32x4(y[k], y[4 + k], 0x88), b = _mm512_shuffle_i32x4(y[k], y[4 + k], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(y[8 + k], y[12 + k], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(y[8 + k], y[12 + k], 0xdd);
    x[k] = _mm512_shuffle_i32x4(a, c, 0x88);
    x[8 + k] = _mm512_shuffle_i32x4(a, c, 0xdd);
    x[4 + k] = _mm512_shuffle_i32x4(b, d, 0x88);
    x[12 + k] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace qquant

#endif
