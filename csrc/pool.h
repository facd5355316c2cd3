// max_pool_codes before its kernel runs, the same for every backend, and the arithmetic of its windows.
//
// Codes rise with values, so that the largest code of a window is the code of its largest value; what is padded is 0,
// the least code.
#pragma once

#include "conv.h"

namespace ptq4cuda {

// The taps of a window that are inside of the image, along one of its sides: count of them, from `first` on.
struct Inside {
    int32_t first, count;

    // Of output o. PoolOps sees to it that nothing here leaves 32 bits.
    PTQ_INLINE Inside(int32_t o, int32_t size, int32_t kernel, int32_t stride, int32_t padding, int32_t dilation) {
        const int32_t begin = o * stride - padding;
        const int32_t outside = begin < 0 ? (dilation - 1 - begin) / dilation : 0;
        first = begin + outside * dilation;
        const int32_t inside = first < size ? (size - 1 - first) / dilation + 1 : 0;
        count = kernel - outside < inside ? kernel - outside : inside;
    }
};

struct PoolProblem : Geometry {
    const uint8_t* x;  // [N, H, W, C]
    uint8_t* y;        // [N, out H, out W, C]

    PTQ_INLINE Inside rows(int64_t o) const {
        return taps(o, in.height, kernel.height, stride.height, padding.height, dilation.height);
    }
    PTQ_INLINE Inside columns(int64_t o) const {
        return taps(o, in.width, kernel.width, stride.width, padding.width, dilation.width);
    }

private:
    PTQ_INLINE static Inside taps(int64_t o, int64_t size, int64_t k, int64_t s, int64_t p, int64_t d) {
        return {static_cast<int32_t>(o), static_cast<int32_t>(size), static_cast<int32_t>(k),
                static_cast<int32_t>(s), static_cast<int32_t>(p),    static_cast<int32_t>(d)};
    }
};

// The problem of pooling codes of this shape [N, C, H, W], without pointers. Fails with a sentence.
inline PoolProblem pool_problem(const char* op, Numbers x, Numbers kernel_size, Numbers stride, Numbers padding,
                                Numbers dilation, bool ceil_mode) {
    PoolProblem problem{};
    problem.batch = x[0];
    problem.channels = x[1];
    problem.in = {x[2], x[3]};
    set_window(op, kernel_size, stride, padding, dilation, problem);
    const auto too_large = [&](bool fits) {
        STD_TORCH_CHECK(fits, op, ": x ", list_of(x), " with the padding ", list_of(padding), " or the window ",
                        list_of(kernel_size), " with the stride ", list_of(stride), " is too large");
    };
    too_large(std::max({problem.channels, problem.in.height, problem.in.width}) < kLimit);
    const auto size = [&](int64_t in, int64_t k, int64_t s, int64_t p, int64_t d) {
        const int64_t room = in + 2 * p - d * (k - 1) - 1;
        STD_TORCH_CHECK(room >= 0, op, ": the window ", list_of(kernel_size), " is larger than the padded input ",
                        list_of(x));
        int64_t out = (room + (ceil_mode ? s - 1 : 0)) / s + 1;
        if (ceil_mode && (out - 1) * s >= in + p) --out;  // a window must begin before the padding on its right
        return out;
    };
    problem.out = {size(problem.in.height, problem.kernel.height, problem.stride.height, problem.padding.height,
                        problem.dilation.height),
                   size(problem.in.width, problem.kernel.width, problem.stride.width, problem.padding.width,
                        problem.dilation.width)};
    const Extent padded = {problem.in.height + 2 * problem.padding.height,
                           problem.in.width + 2 * problem.padding.width};
    too_large(product_below(kLimit, {padded.height, padded.width}) &&
              product_below(kWindowBytes, {2 * padded.width, problem.channels}) &&
              product_below(kOutputs, {problem.batch, problem.channels, problem.out.height, problem.out.width}));
    return problem;
}

// The backend's
//     static void max_pool(const Tensor& x, const PoolProblem&)
// fills y, which is not empty.
template <class Backend>
struct PoolOps {
    using Pair = std::vector<int64_t>;

    static Tensor max_pool_codes(const Tensor& x, Pair kernel_size, Pair stride, Pair padding, Pair dilation,
                                 bool ceil_mode) {
        const char* op = "max_pool_codes";
        STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte && x.dim() == 4, op,
                        ": x must be a uint8 tensor [N, C, H, W], got ", described(x));
        PoolProblem problem = pool_problem(op, sizes_of(x), kernel_size, stride, padding, dilation, ceil_mode);
        const Tensor source =
            is_channels_last(x) ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
        const int64_t height = problem.out.height, width = problem.out.width, channels = problem.channels;
        const Tensor y =
            empty_strided({problem.batch, channels, height, width},
                          {height * width * channels, 1, width * channels, channels}, ScalarType::Byte, x);
        if (y.numel() == 0) return y;
        problem.x = source.const_data_ptr<uint8_t>();
        problem.y = y.mutable_data_ptr<uint8_t>();
        Backend::max_pool(source, problem);
        return y;
    }
};

}  // namespace ptq4cuda
