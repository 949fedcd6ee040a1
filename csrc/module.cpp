// The module danet_kernels._C: facts about the build and the CPU. It has no tensors and does not know torch.
#include <pybind11/pybind11.h>

#include "cpu/features.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict features;
  features["arch"] = danet::cpu_arch();
  features["avx2"] = danet::cpu_has_avx2();
  features["avx512"] = danet::cpu_has_avx512();
  features["avx512_bf16"] = danet::cpu_has_avx512_bf16();
  return features;
}

py::dict compiled_with() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["cxx_standard"] = static_cast<long>(__cplusplus);
#if defined(__OPTIMIZE__)
  facts["optimized"] = true;
#else
  facts["optimized"] = false;
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about the C++ build and the CPU, without torch.";
  module.def("cpu_features", &cpu_features, "The instruction sets that this CPU and operating system offer.");
  module.def("compiled_with", &compiled_with, "The compiler, C++ standard and optimization of this module.");
}
