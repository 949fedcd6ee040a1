// The module danet_kernels._C: facts about the build and the CPU, and the kernels' plans. It has no tensors, knows no
// torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "channel_plan.h"
#include "cpu/features.h"
#include "cuda/channel_plan.h"
#include "cuda/plan.h"
#include "plan.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict features;
  features["arch"] = danet::cpu_arch();
  features["avx2"] = danet::cpu_has_avx2();
  features["avx512"] = danet::cpu_has_avx512();
  features["avx512_bf16"] = danet::cpu_has_avx512_bf16();
  features["runs_bf16_kernel"] = danet::cpu_runs_bf16_kernel();
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

danet::Dtype dtype_of(const std::string& name) {
  if (name == "float32") return danet::Dtype::kFloat32;
  if (name == "float64") return danet::Dtype::kFloat64;
  if (name == "bfloat16") return danet::Dtype::kBFloat16;
  if (name == "float16") return danet::Dtype::kFloat16;
  throw std::invalid_argument("unknown dtype " + name);
}

int64_t position_forward_workspace(int64_t B, int64_t C, int64_t D, int64_t M, int64_t N, const std::string& dtype,
                                   int64_t threads) {
  const bool bf16_kernel = dtype == "bfloat16" && danet::cpu_runs_bf16_kernel();
  return danet::position_forward_workspace(B, C, D, M, N, dtype_of(dtype), threads, bf16_kernel);
}

int64_t position_backward_workspace(int64_t B, int64_t C, int64_t D, int64_t M, int64_t N, const std::string& dtype,
                                    int64_t threads) {
  return danet::position_backward_workspace(B, C, D, M, N, dtype_of(dtype), threads);
}

int64_t channel_forward_workspace(int64_t B, int64_t C, int64_t N, const std::string& dtype, int64_t threads) {
  return danet::channel_forward_workspace(B, C, N, dtype_of(dtype), threads);
}

int64_t channel_backward_workspace(int64_t B, int64_t C, int64_t N, const std::string& dtype, int64_t threads) {
  return danet::channel_backward_workspace(B, C, N, dtype_of(dtype), threads);
}

int64_t position_cuda_splits(int64_t B, int64_t L, int64_t K, int64_t D, const std::string& dtype,
                             int64_t multiprocessors) {
  return danet::position_splits(B, L, K, D, dtype_of(dtype), multiprocessors);
}

int64_t hopper_parts(int64_t B, int64_t C, int64_t L, int64_t K, int64_t multiprocessors) {
  return danet::hopper_rounds(B, C, L, K, multiprocessors).parts() * danet::kHopperPart * int64_t{sizeof(float)};
}

int64_t channel_cuda_workspace(int64_t B, int64_t C, int64_t N, const std::string& dtype, bool backward,
                               int64_t multiprocessors) {
  return danet::channel_cuda_workspace(B, C, N, dtype_of(dtype), backward, multiprocessors);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about the C++ build and the CPU, without torch.";
  module.def("cpu_features", &cpu_features, "The instruction sets that this CPU and operating system offer.");
  // Bytes that a kernel allocates beyond its results.
  const auto B = py::arg("B"), C = py::arg("C"), D = py::arg("D"), M = py::arg("M"), N = py::arg("N");
  const auto dtype = py::arg("dtype"), threads = py::arg("threads");
  module.def("position_forward_workspace", &position_forward_workspace, B, C, D, M, N, dtype, threads);
  module.def("position_backward_workspace", &position_backward_workspace, B, C, D, M, N, dtype, threads);
  module.def("channel_forward_workspace", &channel_forward_workspace, B, C, N, dtype, threads);
  module.def("channel_backward_workspace", &channel_backward_workspace, B, C, N, dtype, threads);
  const auto multiprocessors = py::arg("multiprocessors");
  module.def("position_cuda_splits", &position_cuda_splits, B, py::arg("L"), py::arg("K"), D, dtype, multiprocessors,
             "Sums that the gradient of query or key [B, D, L] is made of, by K positions of the other side.");
  module.def("hopper_parts", &hopper_parts, B, C, py::arg("L"), py::arg("K"), multiprocessors,
             "Bytes of the sums of tiles that blocks share.");
  module.def("channel_cuda_workspace", &channel_cuda_workspace, B, C, N, dtype, py::arg("backward"), multiprocessors);
  module.def("compiled_with", &compiled_with, "The compiler, C++ standard and optimization of this module.");
}
