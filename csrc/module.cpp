// pybind11 module fastast_kernels._C: what was built, and what this processor can run. Importing it
// also registers the ops of library.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and processor information of fastast_kernels' compiled ops.";
  m.def(
      "cpu_isa", [] { return std::string(fastast::name(fastast::isa())); },
      "The instruction set the CPU kernels run with (FASTAST_CPU_ISA lowers it).");
  m.def(
      "supported_cpu_isa", [] { return std::string(fastast::name(fastast::supported_isa())); },
      "The best instruction set of this processor that was built.");
  m.def(
      "built_cpu_isas",
      [] {
#ifdef FASTAST_X86_VARIANTS
        std::vector<std::string> names(std::begin(fastast::kIsaNames),
                                       std::end(fastast::kIsaNames));
#ifndef FASTAST_BF16_PRODUCTS
        names.resize(3);
#endif
        return names;
#else
        return std::vector<std::string>{"portable"};
#endif
      },
      "The instruction sets that were built.");
  m.def(
      "cuda_architectures",
      [] {
        std::vector<std::string> architectures;
        const std::string list = FASTAST_CUDA_ARCHITECTURES;
        for (std::size_t from = 0; from < list.size();) {
          std::size_t to = list.find(';', from);
          if (to == std::string::npos) to = list.size();
          architectures.push_back(list.substr(from, to - from));
          from = to + 1;
        }
        return architectures;
      },
      "The CUDA architectures that were built, none in a CPU build.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = FASTAST_BUILT_WITH_TORCH;
        info["compiler"] = __VERSION__;
        info["cuda"] = FASTAST_BUILT_WITH_CUDA;
        return info;
      },
      "Versions this library was built with.");
}
