// conv2d_integer on the CPU: one convolution (conv_step.h), laid out for this call alone.
#include "conv_step.h"

namespace ptq4cuda {
namespace {

constexpr int64_t kPackedCodes = 1 << 18;  // worth a thread

// Packs codes of all pixels: nibble after nibble, each octet's into two words.
void pack(const std::vector<uint8_t>& codes, const QuantizerTable& quantizer, const Packing& packing, int64_t pixels,
          uint8_t* to) {
    const int64_t channels = codes.size() / pixels, octets = ceil_div(channels, kOctet);
    std::vector<bool> is_high(channels);
    for (int64_t c = 0; c < channels; ++c) is_high[c] = quantizer[c].qmax > 15.0f;
    torch::stable::parallel_for(0, pixels, kPackedCodes / channels + 1, [&](int64_t p, int64_t end_pixel) {
        for (; p < end_pixel; ++p)
            for (int64_t k = 0; k < octets; ++k) {
                uint32_t low = 0, high = 0;
                int bits = 0;  // of the high nibbles
                for (int64_t c = k * kOctet; c < std::min(channels, (k + 1) * kOctet); ++c) {
                    const uint32_t code = codes[p * channels + c];
                    low |= (code & 15) << (c % kOctet * 4);
                    if (!is_high[c]) continue;
                    high |= code >> 4 << bits;
                    bits += 4;
                }
                uint8_t* pixel = to + p * packing.bytes;
                std::memcpy(pixel + k * sizeof low, &low, sizeof low);
                const int32_t begin = packing.begin(k), end = packing.end(k);
                for (int32_t b = begin; b < end; ++b)
                    pixel[b] = b - begin < 4 ? static_cast<uint8_t>(high >> (8 * (b - begin))) : 0;
            }
    });
}

struct Cpu {
    // Outputs that are packed are computed in bytes first.
    template <class T>
    static void conv(const Tensor&, const ConvProblem& given, T* y) {
        ConvProblem problem = given;
        const int64_t pixels = problem.shape.pixels(), size = pixels * problem.shape.out_channels;
        std::vector<uint8_t> out(given.out_packing.starts ? size : 0), also(given.also_packing.starts ? size : 0);
        if (!also.empty()) problem.also = also.data();
        if constexpr (std::is_same_v<T, uint8_t>) {
            convolve<T>(problem, out.empty() ? y : out.data());
            if (!out.empty()) pack(out, given.out_quantizer, given.out_packing, pixels, y);
        } else {
            convolve<T>(problem, y);
        }
        if (!also.empty()) pack(also, given.also_quantizer, given.also_packing, pixels, given.also);
    }

private:
    template <class T>
    static void convolve(const ConvProblem& problem, T* y) {
        auto step = std::make_unique<Convolution<T>>(std::make_unique<ConvLayer>(problem, false), problem.shape);
        step->place({problem.x, problem.residual, y, problem.also});
        run_step(std::move(step));
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) { m.impl("conv2d_integer", TORCH_BOX(&ConvOps<Cpu>::conv2d_integer)); }

}  // namespace ptq4cuda
