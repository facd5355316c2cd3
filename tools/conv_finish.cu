// Kernels that only finish sums, one for each kind of result, so that tools/sass.py can count what an output costs:
// conv_kernel has all kinds in one code. They are compiled and counted, never run.
#include "cuda/conv_finish.cuh"

namespace ptq4cuda {
namespace {

struct None {};
struct Residual {};
struct Bytes {};
struct Packed {};

constexpr int kPixels = 8;  // of a thread, as in conv_kernel

// Loads of 16 bytes bring the sums; all else that a turn executes finishes them. `Out` is a type of values, Bytes or
// Packed, `Also` None, Bytes or Packed.
template <class Out, class Added, class Also>
__global__ void __launch_bounds__(128, 4)
    finish_kernel(const __grid_constant__ ConvProblem problem, const __grid_constant__ Output output,
                  const __grid_constant__ Window window, const int32_t* from) {
    __shared__ Constants constants;
    prepare<128, 1>(problem, output, false, 0, kStrip, &constants);
    __syncthreads();
    ConvProblem part = problem;
    Output to = output;
    constexpr bool has_codes = std::is_same_v<Out, Bytes> || std::is_same_v<Out, Packed>;
    to.clamps = has_codes;
    if constexpr (has_codes) {
        to.dtype = ScalarType::Byte;
    } else {
        to.dtype = torch::headeronly::CppTypeToScalarType<Out>::value;
    }
    const auto fix = [](auto*& pointer, bool there) {
        if (!there) pointer = nullptr;
        __builtin_assume(!there || pointer);
    };
    fix(part.residual, std::is_same_v<Added, Residual>);
    fix(part.also, !std::is_same_v<Also, None>);
    fix(part.out_packing.starts, std::is_same_v<Out, Packed>);
    fix(part.also_packing.starts, std::is_same_v<Also, Packed>);
    const int octet = threadIdx.x % kOctets;
    for (int pixel = threadIdx.x / kOctets; pixel < window.pixels; pixel += 32 * static_cast<int>(gridDim.x)) {
        int sums[kOctet][kPixels];
#pragma unroll
        for (int i = 0; i < kOctet * kPixels; i += 4, from += 4 * 128) {
            const Words<16> four = load_words<16>(from + 4 * threadIdx.x);
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[(i + k) / kPixels][(i + k) % kPixels] = static_cast<int>(four.at[k]);
        }
        if (has_codes) __builtin_assume(!constants.activates[octet]);  // its activation is a ReLU or none
        finish_octet<kPixels>(
            part, to, constants, octet, pixel, window.pixels, octet * kOctet,
            [&](int j, int p) -> int& { return sums[j][p]; }, [](int p) { return p / 2 * 8 + p % 2; });
    }
}

#define PTQ_FINISH_ONE(...)                                                                  \
    template __global__ void finish_kernel<__VA_ARGS__>(const __grid_constant__ ConvProblem, \
                                                        const __grid_constant__ Output,      \
                                                        const __grid_constant__ Window, const int32_t*);
#define PTQ_FINISH(Out)                  \
    PTQ_FINISH_ONE(Out, None, None)      \
    PTQ_FINISH_ONE(Out, None, Bytes)     \
    PTQ_FINISH_ONE(Out, None, Packed)    \
    PTQ_FINISH_ONE(Out, Residual, None)  \
    PTQ_FINISH_ONE(Out, Residual, Bytes) \
    PTQ_FINISH_ONE(Out, Residual, Packed)
PTQ_FINISH(float)
PTQ_FINISH(torch::headeronly::Half)
PTQ_FINISH(Bytes)
PTQ_FINISH(Packed)

}  // namespace
}  // namespace ptq4cuda
