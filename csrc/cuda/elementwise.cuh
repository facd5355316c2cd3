// One kernel for all elementwise work with a quantizer per channel.
//
// The tensor is flat memory, cut into groups of Op::kGroup values, whose wider side (input or output) is 16 bytes or
// a multiple. The narrower side of a group is 2 to 8 bytes: a warp moves whole cache lines there, too. Thread t takes
// the groups t, t + stride, t + 2 stride, ..., several of them at a time: all loads are issued before the first value
// is used, because a memory-bound kernel lives from the bytes it has in flight.
//
// Which channel a value belongs to is never computed by a division per group:
//   uniform     one quantizer serves the whole tensor;
//   periodic    short rows (channels_last: inner is 1), and more channels than fit into shared memory. Channels
//               repeat after channels * inner values, and the stride is made a multiple of that period: a thread
//               meets the same channels in every group, and keeps their quantizers in registers;
//   rows        long rows (NCHW) of whole groups. The quantizers of all channels are in shared memory. A thread
//               divides once, at its start, and then adds the stride to (channel, offset in the row) with carry,
//               like an odometer;
//   crossing    long rows that end within groups. A group touches two channels at most.
//
// A tensor may start anywhere, for example in the middle of another one. Then group 0 begins `lead` values before it,
// where memory is aligned, and is incomplete, as the last group may be. The values of incomplete groups are done one
// by one, by the first threads.
#pragma once

#include "codes.cuh"

namespace ptq4cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;  // that are resident: 64 registers a thread
constexpr int kInFlight = 16;                // values a thread loads before it uses the first

constexpr int64_t kTableBytes = 48 << 10;          // of all channels' quantizers, in shared memory
constexpr int64_t kLongestRow = int64_t{1} << 31;  // whose places 32 bits can hold

struct Elements {
    int64_t units, head, tail;        // what is done one by one: units 0 to head and from tail on
    int64_t first_whole, last_whole;  // groups that lie in the tensor with all their values
    int64_t lead;                     // values of group 0 that lie before the tensor
    int64_t stride;                   // from a thread's group to its next one
    int64_t channels, inner;
    int channel_step;  // the stride, as channels and values of a row
    uint32_t offset_step;
    bool input_aligned, output_aligned;
};

// --- where the quantizers of a group come from -------------------------------------------------------------------

enum class Source { uniform, periodic, rows, crossing };

// Of a thread's group: of(j) is what value j needs. fetch() comes before, advance() after the work on a group.
template <class Op, Source source>
struct Quantizers;

template <class Op>
struct Quantizers<Op, Source::uniform> {
    typename Op::Parameters all;

    __device__ Quantizers(const Elements&, const QuantizerTable& table, int64_t) : all(table[0]) {}
    __device__ __forceinline__ void fetch() {}
    __device__ __forceinline__ void advance(const Elements&) {}
    __device__ __forceinline__ const typename Op::Parameters& of(int) const { return all; }
};

template <class Op>
struct Quantizers<Op, Source::periodic> {
    typename Op::Parameters each[Op::kGroup];

    __device__ Quantizers(const Elements& e, const QuantizerTable& table, int64_t group) {
        const int64_t period = e.channels * e.inner;
        int64_t place = (group * Op::kGroup + period - e.lead % period) % period;
#pragma unroll
        for (int j = 0; j < Op::kGroup; ++j) {
            each[j] = typename Op::Parameters(table[e.inner == 1 ? place : place / e.inner]);
            if (++place == period) place = 0;
        }
    }
    __device__ __forceinline__ void fetch() {}
    __device__ __forceinline__ void advance(const Elements&) {}
    __device__ __forceinline__ const typename Op::Parameters& of(int j) const { return each[j]; }
};

// Long rows. The block's table of parameters has the first channel once more behind the last one.
template <class Parameters>
struct RowQuantizers {
    const Parameters* parameters = dynamic_shared_memory<Parameters>();
    int channel;
    uint32_t offset;  // of the group's first value in its row

    __device__ RowQuantizers(const Elements& e, const QuantizerTable& table, int64_t first_value) {
        Parameters* all = dynamic_shared_memory<Parameters>();
        const int channels = static_cast<int>(e.channels);
        for (int c = threadIdx.x; c <= channels; c += kThreads) all[c] = Parameters(table[c == channels ? 0 : c]);
        __syncthreads();
        const int64_t value = first_value + e.channels * e.inner;
        offset = static_cast<uint32_t>(value % e.inner);
        channel = static_cast<int>(value / e.inner % e.channels);
    }
    __device__ __forceinline__ void advance(const Elements& e) {
        offset += e.offset_step;
        channel += e.channel_step;
        if (offset >= static_cast<uint32_t>(e.inner)) {
            offset -= static_cast<uint32_t>(e.inner);
            ++channel;
        }
        if (channel >= static_cast<int>(e.channels)) channel -= static_cast<int>(e.channels);
    }
};

template <class Op>
struct Quantizers<Op, Source::rows> : RowQuantizers<typename Op::Parameters> {
    using Row = RowQuantizers<typename Op::Parameters>;
    typename Op::Parameters all;

    __device__ Quantizers(const Elements& e, const QuantizerTable& table, int64_t group)
        : Row(e, table, group * Op::kGroup - e.lead) {}
    __device__ __forceinline__ void fetch() { all = Row::parameters[Row::channel]; }
    __device__ __forceinline__ const typename Op::Parameters& of(int) const { return all; }
};

template <class Op>
struct Quantizers<Op, Source::crossing> : RowQuantizers<typename Op::Parameters> {
    using Row = RowQuantizers<typename Op::Parameters>;
    uint32_t inner, left;  // values of a row, those left in it
    typename Op::Parameters here, next;

    __device__ Quantizers(const Elements& e, const QuantizerTable& table, int64_t group)
        : Row(e, table, group * Op::kGroup - e.lead), inner(static_cast<uint32_t>(e.inner)) {}
    __device__ __forceinline__ void fetch() {
        here = Row::parameters[Row::channel];
        next = Row::parameters[Row::channel + 1];
        left = inner - Row::offset;
    }
    __device__ __forceinline__ typename Op::Parameters of(uint32_t j) const { return j < left ? here : next; }
};

// --- the kernel --------------------------------------------------------------------------------------------------

// An Op says how a group of kGroup values goes from kInputs elements of Input to kOutputs elements of Output:
// apply(). one() does the same for a unit, which is kUnit values that share an element: the i-th.
template <class Op, Source source>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    elementwise_kernel(const typename Op::Input* x, typename Op::Output* y, QuantizerTable table, Elements e) {
    using In = typename Op::Input;
    using Out = typename Op::Output;
    constexpr int kInBytes = Op::kInputs * sizeof(In), kOutBytes = Op::kOutputs * sizeof(Out);
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, first = e.first_whole + thread;
    Quantizers<Op, source> quantizers(e, table, first);
    if (thread < e.head + e.units - e.tail) {
        const int64_t unit = thread < e.head ? thread : thread - e.head + e.tail;
        Op::one(x, y, unit, [&](int64_t value) { return table[value / e.inner % e.channels]; });
    }
    if (thread >= e.stride) return;

    // Group g begins at g * kInputs and g * kOutputs.
    const In* const origin = x - e.lead * Op::kInputs / Op::kGroup;
    const In* from = origin + first * Op::kInputs;
    Out* to = y - e.lead * Op::kOutputs / Op::kGroup + first * Op::kOutputs;
    const In* const end = origin + e.last_whole * Op::kInputs;
    const int64_t in_step = e.stride * Op::kInputs, out_step = e.stride * Op::kOutputs;
    const auto finished = [&](const Words<kInBytes>& in) {
        quantizers.fetch();
        const Words<kOutBytes> out = Op::apply(in, quantizers);
        quantizers.advance(e);
        return out;
    };
    if (e.input_aligned && e.output_aligned) {
        constexpr int kGroups = kInFlight / Op::kGroup;
        for (; from + (kGroups - 1) * in_step < end; from += kGroups * in_step, to += kGroups * out_step) {
            Words<kInBytes> in[kGroups];
#pragma unroll
            for (int u = 0; u < kGroups; ++u) in[u] = load_words<kInBytes>(from + u * in_step);
#pragma unroll
            for (int u = 0; u < kGroups; ++u) store_words(to + u * out_step, finished(in[u]));
        }
    }
#pragma unroll 1  // what is left, or all
    for (; from < end; from += in_step, to += out_step) {
        const Words<kInBytes> in = load_group<In, kInBytes>(from, e.input_aligned);
        store_group<Out, kOutBytes>(to, finished(in), e.output_aligned);
    }
}

// x and y point at the first value of a tensor with the given layout, which is not empty. Where a byte holds two
// values, their number is even.
template <class Op>
void elementwise(const typename Op::Input* x, typename Op::Output* y, const ChannelLayout& layout,
                 const QuantizerTable& table, const CurrentStream& stream) {
    constexpr int G = Op::kGroup;
    const int64_t count = layout.numel();

    Elements e;
    e.channels = layout.channels;
    e.inner = layout.inner;
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) / sizeof(*x) % Op::kInputs);
    e.lead = Op::kUnit == 1 ? misaligned : 0;
    e.input_aligned = is_aligned<Op::kInputs>(x - e.lead * Op::kInputs / G);
    e.output_aligned = is_aligned<Op::kOutputs>(y - e.lead * Op::kOutputs / G);
    e.first_whole = e.lead > 0;
    e.last_whole = std::max((count + e.lead) / G, e.first_whole);
    e.units = count / Op::kUnit;
    e.head = std::min(e.first_whole * G - e.lead, count) / Op::kUnit;
    e.tail = std::max(e.last_whole * G - e.lead, int64_t{0}) / Op::kUnit;
    e.tail = std::clamp(e.tail, e.head, e.units);

    const int64_t groups = e.last_whole - e.first_whole;
    const int64_t resident = multiprocessors() * kBlocksPerMultiprocessor * kThreads;
    const int64_t wanted = std::clamp<int64_t>(groups, 1, resident);
    const auto run = [&](auto* kernel, int64_t threads_of_period, size_t shared_bytes) {
        e.stride = ceil_div(wanted, threads_of_period) * threads_of_period;
        e.channel_step = static_cast<int>(e.stride * G / e.inner % e.channels);
        e.offset_step = static_cast<uint32_t>(e.stride * G % e.inner);
        const int64_t grid = ceil_div(std::min(e.stride, std::max<int64_t>(groups, 1)), kThreads);
        STD_TORCH_CHECK(grid <= kMaximumGrid, "a tensor of ", count, " values is too large for one launch");
        launch(kernel, grid, kThreads, shared_bytes, stream, x, y, table, e);
    };
    const int64_t table_bytes = (e.channels + 1) * static_cast<int64_t>(sizeof(typename Op::Parameters));
    if (table.per_tensor() || e.channels == 1) {
        run(elementwise_kernel<Op, Source::uniform>, kThreads, 0);
    } else if (e.inner < G || table_bytes > kTableBytes || e.inner > kLongestRow) {
        const int64_t period = e.channels * e.inner;
        run(elementwise_kernel<Op, Source::periodic>, period / std::gcd(period, int64_t{G}), 0);
    } else if (e.lead == 0 && e.inner % G == 0) {
        run(elementwise_kernel<Op, Source::rows>, kThreads, table_bytes);
    } else {
        run(elementwise_kernel<Op, Source::crossing>, kThreads, table_bytes);
    }
}

}  // namespace
}  // namespace ptq4cuda
