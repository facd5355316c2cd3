// One kernel for all elementwise work with a quantizer per channel.
//
// The tensor is flat memory, cut into groups of Op::kGroup values: 16 bytes of input, moved by one load. Thread t
// takes the groups t, t + stride, t + 2 stride, ..., kInFlight of them at a time: all loads are issued before the
// first value is used, because a memory-bound kernel lives from the bytes it has in flight.
//
// Which channel a value belongs to is never computed by a division per value:
//   uniform     one quantizer serves the whole tensor;
//   periodic    short rows (channels_last: inner is 1). Channels repeat after channels * inner values, and the stride
//               is made a multiple of that period: a thread meets the same channels in every group, and keeps their
//               quantizers in registers;
//   rows        long rows (NCHW). A group touches two channels at most. A thread divides once, at its start, and then
//               adds the stride to (channel, offset in the row) with carry, like an odometer.
//
// A tensor may start anywhere, for example in the middle of another one. Then group 0 begins `lead` values before it,
// where memory is aligned, and is incomplete, as the last group may be; values outside are neither read nor written.
#pragma once

#include "launch.cuh"

namespace ptq4cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;  // 2048 threads, as many as fit
constexpr int kInFlight = 4;                 // groups a thread loads before it uses the first

struct Elements {
    int64_t count;   // values in the tensor
    int64_t lead;    // values of group 0 that lie before the tensor
    int64_t groups;  // all groups; those from first_whole to last_whole lie in the tensor with all their values
    int64_t first_whole, last_whole;
    int64_t stride;  // from a thread's group to its next one
    int64_t channels, inner;
    bool input_aligned, output_aligned;
};

// --- where the quantizers of a group come from -------------------------------------------------------------------

enum class Source { uniform, periodic, rows };

template <Source source, int G>
struct GroupQuantizers;

template <int G>
struct GroupQuantizers<Source::uniform, G> {
    Quantizer quantizer;

    __device__ GroupQuantizers(const Elements&, const QuantizerTable& table, int64_t) : quantizer(table[0]) {}
    __device__ void advance() {}

    // Calls f with a function from a value's place in the group to its quantizer.
    template <class F>
    __device__ __forceinline__ void visit(const F& f) const {
        f([&](int) -> const Quantizer& { return quantizer; });
    }
};

template <int G>
struct GroupQuantizers<Source::periodic, G> {
    Quantizer quantizers[G];

    __device__ GroupQuantizers(const Elements& e, const QuantizerTable& table, int64_t group) {
        const int64_t period = e.channels * e.inner;
        int64_t place = (group * G - e.lead % period + period) % period;
#pragma unroll
        for (int j = 0; j < G; ++j) {
            quantizers[j] = table[e.inner == 1 ? place : place / e.inner];
            if (++place == period) place = 0;
        }
    }
    __device__ void advance() {}

    template <class F>
    __device__ __forceinline__ void visit(const F& f) const {
        f([&](int j) -> const Quantizer& { return quantizers[j]; });
    }
};

template <int G>
struct GroupQuantizers<Source::rows, G> {
    const QuantizerTable& table;
    int64_t channels, inner, channel, offset, channel_step, offset_step;

    __device__ GroupQuantizers(const Elements& e, const QuantizerTable& table_, int64_t group)
        : table(table_), channels(e.channels), inner(e.inner) {
        const int64_t period = channels * inner;
        const int64_t place = (group * G - e.lead + period) % period, step = e.stride * G % period;
        channel = place / inner;
        offset = place % inner;
        channel_step = step / inner;
        offset_step = step % inner;
    }
    __device__ void advance() {
        offset += offset_step;
        channel += channel_step;
        if (offset >= inner) {
            offset -= inner;
            ++channel;
        }
        if (channel >= channels) channel -= channels;
    }

    template <class F>
    __device__ __forceinline__ void visit(const F& f) const {
        const Quantizer here = table[channel];
        if (offset + G <= inner) {
            f([&](int) { return here; });
        } else {
            const Quantizer next = table[channel + 1 == channels ? 0 : channel + 1];
            const int left = static_cast<int>(inner - offset);
            f([&](int j) { return j < left ? here : next; });
        }
    }
};

// --- the kernel --------------------------------------------------------------------------------------------------

// Op::kGroup values come as Op::kInputs elements of Op::Input and leave as Op::kOutputs elements of Op::Output.
template <class Op, Source source>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const typename Op::Input* x, typename Op::Output* y, QuantizerTable table, Elements e) {
    constexpr int G = Op::kGroup, kInputs = Op::kInputs, kOutputs = Op::kOutputs;
    using In = Vector<typename Op::Input, kInputs>;
    using Out = Vector<typename Op::Output, kOutputs>;
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (thread >= e.stride) return;
    x -= e.lead * kInputs / G;  // now group g begins at g * kInputs and g * kOutputs
    y -= e.lead * kOutputs / G;

    GroupQuantizers<source, G> quantizers(e, table, thread);
    for (int64_t group = thread; group < e.groups; group += kInFlight * e.stride) {
        const auto whole = [&](int u) {
            const int64_t g = group + u * e.stride;
            return e.first_whole <= g && g < e.last_whole;
        };
        In in[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
            if (whole(u)) in[u] = load<kInputs>(x + (group + u * e.stride) * kInputs, e.input_aligned);
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            if (whole(u)) {
                Out out;
                quantizers.visit([&](const auto& quantizer_of) { Op::apply(in[u], out, quantizer_of); });
                store<kOutputs>(y + (group + u * e.stride) * kOutputs, out, e.output_aligned);
            }
            quantizers.advance();
        }
    }

    // The two groups that may be incomplete, one for each of the first two threads.
    if (thread > 1) return;
    const int64_t group = thread == 0 ? e.first_whole - 1 : e.last_whole;
    if (group < 0 || group >= e.groups || (thread == 1 && group == e.first_whole - 1)) return;
    const GroupQuantizers<Source::periodic, G> edge(e, table, group);
    const int64_t begin = group * G - e.lead;
    const auto inside = [&](int value) { return 0 <= begin + value && begin + value < e.count; };
    In in;
    Out out;
#pragma unroll  // registers have no index at run time
    for (int i = 0; i < kInputs; ++i)
        if (inside(i * G / kInputs)) in.at[i] = x[group * kInputs + i];
    edge.visit([&](const auto& quantizer_of) { Op::apply(in, out, quantizer_of); });
#pragma unroll
    for (int i = 0; i < kOutputs; ++i)
        if (inside(i * G / kOutputs)) y[group * kOutputs + i] = out.at[i];
}

// x and y point at the first value of a tensor with the given layout, which is not empty. Where a byte holds two
// values, the number of values is even and lead is 0.
template <class Op>
void elementwise(const typename Op::Input* x, typename Op::Output* y, const ChannelLayout& layout,
                 const QuantizerTable& table, const CurrentStream& stream) {
    constexpr int G = Op::kGroup;
    const bool uniform = table.per_tensor() || layout.channels == 1;
    const bool rows = layout.inner >= G;

    Elements e;
    e.count = layout.numel();
    e.channels = layout.channels;
    e.inner = layout.inner;
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) / sizeof(*x) % Op::kInputs);
    e.lead = Op::kInputs == G && Op::kOutputs == G ? misaligned : 0;
    e.input_aligned = is_aligned<Op::kInputs>(x - e.lead * Op::kInputs / G);
    e.output_aligned = is_aligned<Op::kOutputs>(y - e.lead * Op::kOutputs / G);
    e.groups = ceil_div(e.count + e.lead, G);
    e.first_whole = e.lead > 0;
    e.last_whole = std::max((e.count + e.lead) / G, e.first_whole);

    const int64_t resident = multiprocessors() * kBlocksPerMultiprocessor * kThreads;
    const int64_t wanted = std::clamp<int64_t>(e.groups, 2, resident);
    if (uniform || rows) {
        e.stride = ceil_div(wanted, kThreads) * kThreads;
    } else {
        const int64_t period = e.channels * e.inner;
        const int64_t groups = period / std::gcd(period, int64_t{G});  // channels repeat after so many groups
        e.stride = ceil_div(wanted, groups) * groups;
    }
    const int64_t grid = ceil_div(std::min(e.stride, e.groups), kThreads);
    STD_TORCH_CHECK(grid <= kMaximumGrid, "a tensor of ", e.count, " values is too large for one launch");

    const auto run = [&](auto* kernel) { launch(kernel, grid, kThreads, 0, stream, x, y, table, e); };
    if (uniform) {
        run(elementwise_kernel<Op, Source::uniform>);
    } else if (rows) {
        run(elementwise_kernel<Op, Source::rows>);
    } else {
        run(elementwise_kernel<Op, Source::periodic>);
    }
}

}  // namespace
}  // namespace ptq4cuda
