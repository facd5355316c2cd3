// Elementwise work with a quantizer per channel, on any stretch of a tensor seen as [outer, channels, inner].
//
// Long rows take one quantizer a row. Short rows (channels_last: inner is 1) would not fill vector registers; there
// the quantizers of consecutive elements are laid out as arrays, which repeat with a period, and are read in step.
#pragma once

#include <array>
#include <type_traits>

#include "../ops.h"
#include "simd.h"

namespace ptq4cuda {

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

template <class Op, class In, class Out>
class Rows {
public:
    Rows(const ChannelLayout& layout, const QuantizerTable& table) : layout_(layout), table_(table) {
        if (table.per_tensor()) layout_ = {1, 1, layout.numel()};
        const int64_t base = layout_.channels * layout_.inner;
        if (layout_.inner >= kShortRow || base > kMaximumPeriod || base == 0) return;
        const int64_t repeats = std::max<int64_t>(1, kMinimumPeriod / base);
        period_ = base * repeats;
        for (auto& field : fields_) field.reserve(period_);
        for (int64_t i = 0; i < repeats * layout_.channels; ++i) {
            const Quantizer q = table_[i % layout_.channels];
            const float values[] = {q.inv_scale, q.scale, q.zero_point, q.qmax};
            for (int f = 0; f < 4; ++f) fields_[f].insert(fields_[f].end(), layout_.inner, values[f]);
        }
    }

    // Elements begin to end of the flattened layout; x and y point at element `begin`.
    void operator()(const In* x, Out* y, int64_t begin, int64_t end) const {
        simd::Block<In> in;
        simd::Block<Out> out;
        const int64_t length = period_ ? period_ : layout_.inner;
        while (begin < end) {
            const int64_t p = begin % length;
            const int64_t count = std::min({end - begin, length - p, in.kMaximum, out.kMaximum});
            const Source* from = in.read(x, count, count);
            Target* to = out.begin(y);
            if (period_) {
                simd::run<PeriodicRow>(from, to, count, fields_[0].data() + p, fields_[1].data() + p,
                                       fields_[2].data() + p, fields_[3].data() + p);
            } else {
                simd::run<Row>(from, to, count, table_[begin / layout_.inner % layout_.channels]);
            }
            out.finish(y, count);
            x += count;
            y += count;
            begin += count;
        }
    }

private:
    static constexpr int64_t kShortRow = 32;
    static constexpr int64_t kMinimumPeriod = 1024;
    static constexpr int64_t kMaximumPeriod = 1 << 16;

    using Source = typename simd::Block<In>::Value;
    using Target = typename simd::Block<Out>::Value;
    using Result = std::conditional_t<std::is_same_v<Out, uint8_t>, uint8_t, float>;

    struct Row {
        static PTQ_INLINE void run(const Source* __restrict x, Target* __restrict y, int64_t n, Quantizer q) {
            for (int64_t i = 0; i < n; ++i) simd::store(Op::template apply<Result>(simd::to_float(x[i]), q), y[i]);
        }
    };
    struct PeriodicRow {
        static PTQ_INLINE void run(const Source* __restrict x, Target* __restrict y, int64_t n,
                                   const float* __restrict inv_scale, const float* __restrict scale,
                                   const float* __restrict zero_point, const float* __restrict qmax) {
            for (int64_t i = 0; i < n; ++i) {
                const Quantizer q = {inv_scale[i], scale[i], zero_point[i], qmax[i]};
                simd::store(Op::template apply<Result>(simd::to_float(x[i]), q), y[i]);
            }
        }
    };

    ChannelLayout layout_;
    QuantizerTable table_;
    int64_t period_ = 0;                         // 0: long rows
    std::array<simd::Vector<float>, 4> fields_;  // inv_scale, scale, zero_point, qmax of one period
};

}  // namespace ptq4cuda
