// Kernels with one planted fault each: what emu.h must catch.

#pragma once

#include "../../qquant/csrc/cuda/ptx.h"

namespace faults {

constexpr int kThreads = 64;

// Without the barrier a thread reads what its neighbour in the other warp has not written yet.
template <bool kBarrier>
__global__ void neighbour_sum(float* out) {
  QQ_SHARED_DYN(float, shared);
  const int i = int(threadIdx.x);
  shared[i] = float(i);
  if (kBarrier) __syncthreads();
  out[i] = shared[i] + shared[kThreads - 1 - i];
}

__global__ void shuffle_with_a_lane_that_left(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, float(threadIdx.x), 1);
}

__global__ void barrier_for_half_the_block(float* out) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void write_one_past_the_end(float* out) { out[threadIdx.x + 1] = 1.0f; }

__global__ void read_one_before_the_start(float* out, const float* in) {
  out[threadIdx.x] = in[int(threadIdx.x) - 1024];
}

__global__ void misaligned_vector(float* out) { reinterpret_cast<uint4*>(out + 1)[0] = {1u, 2u, 3u, 4u}; }

// The copy is only sure to be there after the wait.
template <bool kWait>
__global__ void copy_through_shared(float* out, const float* in) {
  QQ_SHARED_DYN(float, shared);
  const int i = int(threadIdx.x);
  if (i < kThreads / 4) qquant::copy_async<16>(shared + 4 * i, in + 4 * i, 16);
  qquant::close_group();
  if (kWait) qquant::wait_for_groups<0>();
  __syncthreads();
  out[i] = shared[i];
}

}  // namespace faults

// `which` in the order above, the right one first where there are two; `out` holds 64 floats, `in` likewise.
QQ_LAUNCHER int emu_fault(int which, float* out, const float* in) {
  using namespace faults;
  void* const stream = nullptr;
  const auto with = neighbour_sum<true>, without = neighbour_sum<false>;
  const auto waits = copy_through_shared<true>, hurries = copy_through_shared<false>;
  switch (which) {
    case 0:
      QQ_LAUNCH(with, 1, kThreads, 256, stream, out);
      break;
    case 1:
      QQ_LAUNCH(without, 1, kThreads, 256, stream, out);
      break;
    case 2:
      QQ_LAUNCH(shuffle_with_a_lane_that_left, 1, kThreads, 0, stream, out);
      break;
    case 3:
      QQ_LAUNCH(barrier_for_half_the_block, 1, kThreads, 0, stream, out);
      break;
    case 4:
      QQ_LAUNCH(write_one_past_the_end, 1, kThreads, 0, stream, out);
      break;
    case 5:
      QQ_LAUNCH(read_one_before_the_start, 1, kThreads, 0, stream, out, in);
      break;
    case 6:
      QQ_LAUNCH(misaligned_vector, 1, kThreads, 0, stream, out);
      break;
    case 7:
      QQ_LAUNCH(waits, 1, kThreads, 256, stream, out, in);
      break;
    default:
      QQ_LAUNCH(hurries, 1, kThreads, 256, stream, out, in);
      break;
  }
  return QQ_LAST_ERROR();
}
