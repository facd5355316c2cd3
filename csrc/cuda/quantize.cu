// fake_quantize and quantize on CUDA: one read, one write, one pass. elementwise.cuh explains the kernel; here is
// what happens to one group of values.
#include "elementwise.cuh"

namespace ptq4cuda {
namespace {

// 16 bytes of T are a group.
template <class What, class T>
struct Each;

template <class T>
struct Each<FakeQuantize, T> {
    using Input = T;
    using Output = T;
    using Parameters = FakeQuantizing;
    static constexpr int kGroup = 16 / sizeof(T), kInputs = kGroup, kOutputs = kGroup, kUnit = 1;
    using Group = Values<T, kGroup>;

    template <class Quantizers>
    static __device__ __forceinline__ Words<16> apply(const Words<16>& in, const Quantizers& quantizers) {
        return Group::make([&](int j) { return quantizers.of(j)(Group::get(in, j)); });
    }
    template <class F>
    static __device__ void one(const T* x, T* y, int64_t i, const F& quantizer_of) {
        y[i] = FakeQuantize::apply<T>(static_cast<float>(x[i]), quantizer_of(i));
    }
};

template <class T>
struct Each<Quantize, T> {
    using Input = T;
    using Output = uint8_t;
    using Parameters = Coding;
    static constexpr int kGroup = 16 / sizeof(T), kInputs = kGroup, kOutputs = kGroup, kUnit = 1;

    template <class Quantizers>
    static __device__ __forceinline__ Words<kGroup> apply(const Words<16>& in, const Quantizers& quantizers) {
        Words<kGroup> out{};
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            const Coding& q = quantizers.of(j);
            out.at[j / 4] += q.zero_point() << 8 * (j % 4);
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
            out.at[j / 4] += static_cast<uint32_t>(quantizers.of(j).level(Values<T, kGroup>::get(in, j)))
                             << 8 * (j % 4);
        return out;
    }
    template <class F>
    static __device__ void one(const T* x, uint8_t* y, int64_t i, const F& quantizer_of) {
        y[i] = code(static_cast<float>(x[i]), quantizer_of(i));
    }
};

struct Cuda {
    template <class Op, class T, class Out>
    static void elementwise(const Tensor& x, const Tensor& y, const ChannelLayout& layout,
                            const QuantizerTable& table) {
        const CurrentStream stream(x);
        ptq4cuda::elementwise<Each<Op, T>>(static_cast<const T*>(x.data_ptr()), static_cast<Out*>(y.data_ptr()),
                                           layout, table, stream);
    }
};

}  // namespace

PTQ4CUDA_LIBRARY_IMPL(m) {
    using Ops = QuantizeOps<Cuda>;
    m.impl("fake_quantize", TORCH_BOX(&Ops::fake_quantize));
    m.impl("fake_quantize.out", TORCH_BOX(&Ops::fake_quantize_out));
    m.impl("quantize", TORCH_BOX(&Ops::quantize));
    m.impl("quantize.out", TORCH_BOX(&Ops::quantize_out));
}

}  // namespace ptq4cuda
