// What a kernel asks of its compiler: the plain CUDA forms under nvcc, and those of the test-only emu.h under any other
// C++ compiler, which runs the same .cu thread by thread on a CPU. No kernel and no arithmetic lives here.
//
// A kernel file uses CUDA C++ as it is, but for the macros below: how to launch, how to get at dynamic shared memory
// and at much of it, how to ask for the launch's error.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// `kernel` is a name or a variable: a template's comma would end the macro's argument.
#define QQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#define QQ_SHARED_DYN(type, name)                                  \
  extern __shared__ __align__(16) unsigned char qq_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(qq_shared_bytes)

// Lets a kernel have more dynamic shared memory than the 48 KiB that every kernel may ask for.
#define QQ_ALLOW_SHARED(kernel, shared_bytes) \
  static_cast<void>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (shared_bytes)))

#define QQ_LAST_ERROR() static_cast<int>(cudaGetLastError())

#else

#include "emu.h"

#endif
