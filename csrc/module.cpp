// The pybind11 module _C: build facts. Importing it also registers the CPU kernels of the other files.
// torch 2.10's copy of pybind11 refuses to compile where the stable ABI is targeted; this file includes no other
// header of torch's that the macro concerns.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/simd.h"

PYBIND11_MODULE(_C, m) {
    namespace py = pybind11;
    namespace simd = ptq4cuda::simd;
    m.doc() = "CPU kernels of ptq4cuda and facts about this build.";
    m.def("build_info", [] {
        py::dict info;
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#else
        info["compiler"] = "gcc " __VERSION__;
#endif
        info["version"] = PTQ4CUDA_VERSION;
        info["torch"] = PTQ4CUDA_TORCH_VERSION;
        std::vector<std::string> levels;
        for (simd::Level level : simd::kLevels) levels.push_back(simd::name(level));
        info["simd_levels"] = levels;
        info["simd_level"] = simd::name(simd::level());
        info["cuda_architectures"] = PTQ4CUDA_CUDA_ARCHITECTURES;
        info["cuda_missing"] = PTQ4CUDA_CUDA_MISSING;
        return info;
    });
}
