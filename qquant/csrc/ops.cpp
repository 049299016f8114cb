// Binds the CPU kernels of cpu/ to the operators that kv_ops.py declares, by libtorch's stable ABI: one binary runs under
// torch 2.11 and every later one. Checks of what a kernel cannot take live here; kernels themselves know nothing of torch.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

namespace {

using torch::stable::Tensor;

// Which instruction set the kernels run with on this processor.
std::string cpu_kernel_info() { return "portable"; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qquant, m) { m.def("cpu_kernel_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(qquant, CompositeExplicitAutograd, m) { m.impl("cpu_kernel_info", TORCH_BOX(&cpu_kernel_info)); }

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels; importing it registers them.", -1, nullptr};
  return PyModule_Create(&module);
}
