// The kernels of a Linear for AVX-512 VNNI, put together: sizes, grains, and which of the two multiplies.

#include "linear_avx512.h"

#if QQ_X86

namespace qquant {

namespace {

std::int64_t workspace_bytes(const Linear& problem) { return DigitLayout(problem).bytes(); }

std::int64_t token_grain(const Linear& problem) { return DigitLayout(problem).tile; }

std::int64_t panel_grain(const Linear& problem) { return problem.tokens <= kFewTokens ? 1 : 2; }

void multiply(const Linear& problem, const std::uint8_t* workspace, std::int64_t first, std::int64_t last) {
  (problem.tokens <= kFewTokens ? multiply_few_avx512 : multiply_many_avx512)(problem, workspace, first, last);
}

}  // namespace

const LinearKernels kLinearAvx512 = {workspace_bytes, token_grain, encode_avx512, panel_grain, multiply};

}  // namespace qquant

#endif
