// The pybind11 module _C: build facts and plans. Importing it also registers the CPU kernels of the other files.
// torch 2.10's copy of pybind11 refuses to compile where the stable ABI is targeted; this file includes no other
// header of torch's that the macro concerns.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "conv_plan.h"
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
    m.def("conv_plan", [](int64_t pixels, int64_t outputs, int64_t groups, int64_t chunks, bool packed, bool vectors,
                          int64_t multiprocessors) {
        const ptq4cuda::ConvPlan plan =
            ptq4cuda::plan_conv({pixels, outputs, groups, chunks}, {packed, vectors}, multiprocessors);
        const ptq4cuda::ConvTile tile = ptq4cuda::kConvTiles[plan.tile];
        return py::make_tuple(py::make_tuple(tile.outputs, tile.pixels), plan.splits, plan.blocks, plan.busiest,
                              plan.cycles);
    });
}
