// fake_quantize and quantize on the CPU: one read, one write, one pass.
#include "../entry.h"
#include "rows.h"

namespace ptq4cuda {
namespace {

struct Cpu {
    template <class Op, class T, class Out>
    static void elementwise(const Tensor& x, const Tensor& y, const ChannelLayout& layout,
                            const QuantizerTable& table) {
        const Rows<Op, T, Out> rows(layout, table);
        const T* from = static_cast<const T*>(x.data_ptr());
        Out* to = static_cast<Out*>(y.data_ptr());
        torch::stable::parallel_for(0, layout.numel(), kGrain,
                                    [&](int64_t begin, int64_t end) { rows(from + begin, to + begin, begin, end); });
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) {
    using Ops = QuantizeOps<Cpu>;
    m.impl("fake_quantize", TORCH_BOX(&Ops::fake_quantize));
    m.impl("fake_quantize.out", TORCH_BOX(&Ops::fake_quantize_out));
    m.impl("quantize", TORCH_BOX(&Ops::quantize));
    m.impl("quantize.out", TORCH_BOX(&Ops::quantize_out));
}

}  // namespace ptq4cuda
