// What the bindings of the CUDA kernels share: the device, its current stream, errors, and the plainest checks of
// tensors. ops_cuda.cpp and linear_ops_cuda.cpp include it; no kernel does.
//
// The CUDA runtime is linked in, and torch's is only looked for when a kernel is launched, so that the module loads
// under a CPU build of torch and without a GPU.

#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "launch.h"

#ifndef QQUANT_CUDA_BUILT_FOR
#define QQUANT_CUDA_BUILT_FOR "unknown"
#endif

namespace qquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::int64_t kMaxGrid = 65535;  // second and third size of a launch's grid
constexpr std::int64_t kInt32 = std::int64_t{1} << 31;

using GetStream = std::int32_t (*)(std::int32_t, void**);

// torch's own way to its current stream; null under a CPU build of torch, which has no library of that name loaded.
inline GetStream stream_getter() {
  static const GetStream getter = []() -> GetStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  return getter;
}

inline void check_cuda(int code, const char* what) {
  const char* remedy = "";
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorUnsupportedPtxVersion)
    remedy = "; this module holds kernels for " QQUANT_CUDA_BUILT_FOR
             ", rebuild with QQUANT_CUDA_ARCHS naming this GPU's compute capability";
  STD_TORCH_CHECK(code == 0, what, " failed on the GPU: ", cudaGetErrorString(static_cast<cudaError_t>(code)), remedy);
}

// Makes a tensor's device and its current stream the ones to launch on, for as long as this lives.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {
    // The guard speaks to torch's copy of the runtime; this module's own has to hear of it too.
    check_cuda(cudaSetDevice(device_), "choosing the device");
    const GetStream getter = stream_getter();
    STD_TORCH_CHECK(getter != nullptr, "libtorch_cuda.so is not loaded, so there is no stream to run on");
    STD_TORCH_CHECK(getter(device_, &stream_) == 0, "torch gives no current stream for device ", device_);
  }

  void* stream() const { return stream_; }

  int multiprocessors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_), "asking for multiprocessors");
    return count;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  void* stream_ = nullptr;
};

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (std::int64_t i = 0; i < tensor.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline std::int32_t dtype_of(ScalarType dtype, const char* name) {
  if (dtype == ScalarType::Float) return kQqFloat32;
  if (dtype == ScalarType::Half) return kQqFloat16;
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, name, " must be float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype), "; convert it first");
  return kQqBfloat16;
}

inline void check_device(const Tensor& tensor, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
                  " must be on the device of the others, cuda:", other.get_device_index(), "; move it there");
}

}  // namespace qquant
