// fake_quantize and quantize on CUDA: one read, one write, one pass. elementwise.cuh explains the kernel; here is
// what happens to one group of values.
#include "elementwise.cuh"

namespace ptq4cuda {
namespace {

// 16 bytes of T at a time, each value through What (FakeQuantize or Quantize of numerics.h).
template <class What, class T, class Out>
struct Each {
    using Input = T;
    using Output = Out;
    static constexpr int kGroup = 16 / sizeof(T), kInputs = kGroup, kOutputs = kGroup;

    template <class F>
    static __device__ __forceinline__ void apply(const Vector<T, kInputs>& in, Vector<Out, kOutputs>& out,
                                                 const F& quantizer_of) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
            out.at[j] = What::template apply<Out>(static_cast<float>(in.at[j]), quantizer_of(j));
    }
};

struct Cuda {
    template <class Op, class T, class Out>
    static void elementwise(const Tensor& x, const Tensor& y, const ChannelLayout& layout,
                            const QuantizerTable& table) {
        const CurrentStream stream(x);
        ptq4cuda::elementwise<Each<Op, T, Out>>(static_cast<const T*>(x.data_ptr()), static_cast<Out*>(y.data_ptr()),
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
