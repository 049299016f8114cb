// Which kernels multiply by packed weights on this processor. No arithmetic lives here.

#include "linear.h"

#include "isa.h"

namespace qquant {

const LinearKernels& linear_kernels() {
#if QQ_X86
  if (isa() >= Isa::avx512_vnni) return kLinearAvx512;
  if (isa() == Isa::avx512) return kLinearAvx512Plain;
  if (isa() == Isa::avx2) return kLinearAvx2;
#endif
  return kLinearPortable;
}

const LinearKernels* tile_kernels() {
#if QQ_X86
  if (isa() >= Isa::avx512_bf16) return &kLinearAvx512Tile;
#endif
  return nullptr;
}

}  // namespace qquant
