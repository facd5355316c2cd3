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
        while (begin < end) {
            int64_t count = end - begin;
            if (period_) {
                const int64_t p = begin % period_;
                count = std::min(count, period_ - p);
                simd::run<PeriodicRow>(x, y, count, fields_[0].data() + p, fields_[1].data() + p,
                                       fields_[2].data() + p, fields_[3].data() + p);
            } else {
                const int64_t row = begin / layout_.inner;
                count = std::min(count, (row + 1) * layout_.inner - begin);
                simd::run<Row>(x, y, count, table_[row % layout_.channels]);
            }
            x += count;
            y += count;
            begin += count;
        }
    }

private:
    static constexpr int64_t kShortRow = 32;
    static constexpr int64_t kMinimumPeriod = 1024;
    static constexpr int64_t kMaximumPeriod = 1 << 16;

    struct Row {
        static PTQ_INLINE void run(const In* x, Out* y, int64_t n, Quantizer q) {
            in_floats(x, y, n,
                      [&](const auto* __restrict from, auto* __restrict to, int64_t, int64_t count)
                          __attribute__((always_inline)) {
                              for (int64_t i = 0; i < count; ++i)
                                  to[i] = Op::template apply<Plain>(static_cast<float>(from[i]), q);
                          });
        }
    };
    struct PeriodicRow {
        static PTQ_INLINE void run(const In* x, Out* y, int64_t n, const float* inv_scale, const float* scale,
                                   const float* zero_point, const float* qmax) {
            in_floats(
                x, y, n,
                [&](const auto* __restrict from, auto* __restrict to, int64_t begin,
                    int64_t count) __attribute__((always_inline)) {
                    const float* __restrict inv = inv_scale + begin, * __restrict step = scale + begin, * __restrict zero = zero_point + begin, * __restrict top = qmax + begin;
                    for (int64_t i = 0; i < count; ++i)
                        to[i] = Op::template apply<Plain>(static_cast<float>(from[i]),
                                                          Quantizer{inv[i], step[i], zero[i], top[i]});
                });
        }
    };

    // 16-bit floats are converted on the way, through a buffer in the first-level cache: a loop over floats and bytes
    // is one that every compiler vectorises.
    template <class T>
    static constexpr bool kPlain = std::is_same_v<T, float> || std::is_same_v<T, uint8_t>;
    using Plain = std::conditional_t<kPlain<Out>, Out, float>;

    template <class Loop>
    static PTQ_INLINE void in_floats(const In* x, Out* y, int64_t n, const Loop& loop) {
        if constexpr (kPlain<In> && kPlain<Out>) {
            loop(x, y, int64_t{0}, n);
        } else {
            constexpr int64_t kTile = 256;
            float from[kTile], to[kTile];
            for (int64_t begin = 0; begin < n; begin += kTile) {
                const int64_t count = std::min(kTile, n - begin);
                if constexpr (kPlain<In>) {
                    loop(x + begin, to, begin, count);
                } else if constexpr (kPlain<Out>) {
                    simd::widen(x + begin, from, count);
                    loop(from, y + begin, begin, count);
                } else {
                    simd::widen(x + begin, from, count);
                    loop(from, to, begin, count);
                }
                if constexpr (!kPlain<Out>) simd::narrow(to, y + begin, count);
            }
        }
    }

    ChannelLayout layout_;
    QuantizerTable table_;
    int64_t period_ = 0;                        // 0: long rows
    std::array<std::vector<float>, 4> fields_;  // inv_scale, scale, zero_point, qmax of one period
};

}  // namespace ptq4cuda
