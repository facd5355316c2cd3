// What the library offers beside its kernels: the operators' schemas, facts about the build, and plans. It has
// nothing of Python's: Python calls the functions here through ctypes, and a program without Python needs none of
// them.
#include <cstdint>
#include <string>

#include "conv_plan.h"
#include "cpu/simd.h"
#include "ops.h"

#define PTQ4CUDA_EXPORT extern "C" __attribute__((visibility("default")))

STABLE_TORCH_LIBRARY(ptq4cuda, m) {
    const std::string schemas = PTQ4CUDA_SCHEMAS;  // of ptq4cuda/ops/schemas.py, one a line
    for (size_t begin = 0, end; begin < schemas.size(); begin = end + 1) {
        end = std::min(schemas.find('\n', begin), schemas.size());
        m.def(schemas.substr(begin, end - begin).c_str());
    }
}

// Returns facts about the build, "name=value" a line.
PTQ4CUDA_EXPORT const char* ptq4cuda_build_info() {
    namespace simd = ptq4cuda::simd;
    static const std::string info = [] {
        std::string levels;
        for (simd::Level level : simd::kLevels) levels += std::string(levels.empty() ? "" : " ") + simd::name(level);
        return std::string("version=" PTQ4CUDA_VERSION
                           "\n"
                           "torch=" PTQ4CUDA_TORCH_VERSION
                           "\n"
#if defined(__clang__)
                           "compiler=clang " __clang_version__
                           "\n"
#else
                           "compiler=gcc " __VERSION__
                           "\n"
#endif
                           "cuda_architectures=" PTQ4CUDA_CUDA_ARCHITECTURES
                           "\n"
                           "cuda_missing=" PTQ4CUDA_CUDA_MISSING
                           "\n"
                           "simd_levels=") +
               levels + "\nsimd_level=" + simd::name(simd::level());
    }();
    return info.c_str();
}

// Plans a convolution of `pixels, outputs, groups, chunks, packed, vectors` for so many `multiprocessors`: arguments
// in this order. The plan is the outputs and pixels of a tile, splits, blocks, those of the busiest, and cycles.
PTQ4CUDA_EXPORT void ptq4cuda_conv_plan(const int64_t* arguments, double* plan) {
    const int64_t* a = arguments;
    const ptq4cuda::ConvPlan found = ptq4cuda::plan_conv({a[0], a[1], a[2], a[3]}, {a[4] != 0, a[5] != 0}, a[6]);
    const ptq4cuda::ConvTile tile = ptq4cuda::kConvTiles[found.tile];
    const double values[] = {double(tile.outputs), double(tile.pixels),   double(found.splits),
                             double(found.blocks), double(found.busiest), found.cycles};
    std::copy(std::begin(values), std::end(values), plan);
}
