// channel_histogram on CUDA: a block counts a part of the tensor into 32-bit counters in shared memory, and adds them
// to the 64-bit result at its end. Both with atomic operations on integers, whose order changes nothing.
//
// Two layouts:
//   rows      long rows (NCHW). A block takes a stretch of one channel.
//   columns   short rows (channels_last). A block takes a stretch of the rows, and as many neighbouring channels as
//             have room for their counters. A thread stays in a vector of columns, and so in their channels.
//
// Many values fall into one bin, as the zeros behind a ReLU. So that they do not wait for each other, histograms are
// kept in several copies as far as there is room, neighbouring threads count in different ones, and the counters of a
// bin lie in different banks. No block counts as many as 2^32 values: there are a thousand blocks.
#include "rows.cuh"

namespace ptq4cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kCounters = (48 << 10) / sizeof(uint32_t);  // in shared memory
constexpr int64_t kBlocksWanted = 1024;
constexpr int64_t kSmallestUnit = 1 << 13;  // values of a block
constexpr int kMaximumCopies = 32;

// The histograms of a block: `copies` times `channels` histograms.
struct Counters {
    int channels, bins, stride, copies;

    Counters(int64_t channels_, int64_t bins_, int64_t values)
        : channels(static_cast<int>(channels_)), bins(static_cast<int>(bins_)), stride(stride_of(bins_)) {
        // To zero copies and to add them up should cost less than to count.
        const int64_t one = channels_ * stride;
        copies =
            static_cast<int>(std::clamp<int64_t>(std::min(kCounters / one, values / (4 * one)), 1, kMaximumCopies));
    }
    // An odd number, with a counter for NaN behind the last one.
    static int stride_of(int64_t bins) { return static_cast<int>((bins + 1) | 1); }

    size_t bytes() const { return sizeof(uint32_t) * channels * copies * stride; }

    __device__ void clear(uint32_t* memory) const {
        for (int i = threadIdx.x; i < channels * copies * stride; i += blockDim.x) memory[i] = 0;
        __syncthreads();
    }
    // The histogram that a thread counts in.
    __device__ SharedCounters of(uint32_t* memory, int channel) const {
        return SharedCounters(memory + (threadIdx.x % copies * channels + channel) * stride);
    }
    // Adds the first `present` channels to the result.
    __device__ void add_to(int64_t* out, const uint32_t* memory, int present) const {
        __syncthreads();
        for (int i = threadIdx.x; i < present * bins; i += blockDim.x) {
            uint32_t sum = 0;
            for (int copy = 0; copy < copies; ++copy) sum += memory[(copy * channels + i / bins) * stride + i % bins];
            if (sum > 0)
                atomicAdd(reinterpret_cast<unsigned long long*>(out) + i, static_cast<unsigned long long>(sum));
        }
    }
};

// Where the values of a column go.
struct Accumulator {
    Bins bins;
    SharedCounters counters;

    __device__ __forceinline__ void add(float v) { counters.count(bins(v)); }
};

// All values of a thread that reads rows go to one channel.
template <class T, int V>
struct RowAccumulator : Accumulator {
    __device__ __forceinline__ void add(const Words<V * sizeof(T)>& in) {
#pragma unroll
        for (int j = 0; j < V; ++j) Accumulator::add(Values<T, V>::get(in, j));
    }
};

constexpr int ahead(int vector) { return vector == 8 ? 2 : kInFlight; }  // so that two blocks fit on a multiprocessor

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    histogram_rows_kernel(const T* x, Rows rows, BinTable table, Counters counters, int64_t* out) {
    uint32_t* memory = dynamic_shared_memory<uint32_t>();
    const int64_t channel = blockIdx.x / rows.splits, begin = blockIdx.x % rows.splits * rows.vectors_of_unit;
    counters.clear(memory);
    RowAccumulator<T, V> mine{{Bins(table[channel]), counters.of(memory, 0)}};
    add_rows<T, V, ahead(V)>(x, rows, channel, begin, min(begin + rows.vectors_of_unit, rows.vectors_of_channel),
                             mine);
    counters.add_to(out + channel * table.bins, memory, 1);
}

struct Columns {
    int64_t rows, rows_of_unit;
    int64_t channels, inner;
    int64_t blocks;  // side by side
};

// V neighbouring columns a thread: a block's columns begin with a whole vector, and so does every row.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, V == 8 ? 1 : 2)
    histogram_columns_kernel(const T* x, Columns m, BinTable table, Counters counters, int64_t* out) {
    constexpr int kBytes = V * sizeof(T), kAhead = ahead(V);
    uint32_t* memory = dynamic_shared_memory<uint32_t>();
    const int64_t first = blockIdx.x % m.blocks * counters.channels;
    const int present = static_cast<int>(min(int64_t{counters.channels}, m.channels - first));
    const int64_t begin = blockIdx.x / m.blocks * m.rows_of_unit, end = min(begin + m.rows_of_unit, m.rows);
    const int inner = static_cast<int>(m.inner), width = present * inner / V;
    const int side = min(width, static_cast<int>(blockDim.x)), step = blockDim.x / side;  // vectors and rows at once
    const int64_t pitch = m.channels * m.inner;
    counters.clear(memory);
    const int row_thread = threadIdx.x / side;
    for (int vector = threadIdx.x % side; vector < width && row_thread < step; vector += side) {
        Accumulator mine[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int channel = (vector * V + j) / inner;
            mine[j] = {Bins(table[first + channel]), counters.of(memory, channel)};
        }
        const auto add = [&](const Words<kBytes>& in) {
#pragma unroll
            for (int j = 0; j < V; ++j) mine[j].add(Values<T, V>::get(in, j));
        };
        int64_t row = begin + row_thread;
        const int64_t stride = step * pitch;
        const T* from = x + row * pitch + first * m.inner + vector * V;
        for (; row + (kAhead - 1) * step < end; row += kAhead * step, from += kAhead * stride) {
            Words<kBytes> in[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) in[u] = load_words<kBytes>(from + u * stride);
#pragma unroll
            for (int u = 0; u < kAhead; ++u) add(in[u]);
        }
#pragma unroll 1
        for (; row < end; row += step, from += stride) add(load_words<kBytes>(from));
    }
    counters.add_to(out + first * table.bins, memory, present);
}

// Values of a block: enough that to add up its counters costs less than to count.
int64_t smallest_unit(int64_t counters) { return std::max(kSmallestUnit, 2 * counters); }

void check_grid(int64_t grid, const ChannelLayout& layout) {
    STD_TORCH_CHECK(grid <= kMaximumGrid, "channel_histogram: ", layout.channels,
                    " channels are too many for one launch");
}

template <class T, int V>
void count_rows(const T* x, const ChannelLayout& layout, const BinTable& table, int64_t* out, cudaStream_t stream) {
    Rows rows;
    rows.channels = layout.channels;
    rows.inner = layout.inner;
    rows.vectors_of_row = layout.inner / V;
    rows.vectors_of_channel = layout.per_channel() / V;
    rows.aligned = is_aligned<V>(x);
    const int64_t wanted =
        std::min(ceil_div(kBlocksWanted, layout.channels), ceil_div(layout.per_channel(), smallest_unit(table.bins)));
    rows.vectors_of_unit = ceil_div(rows.vectors_of_channel, wanted);
    rows.splits = ceil_div(rows.vectors_of_channel, rows.vectors_of_unit);
    const int64_t grid = rows.channels * rows.splits;
    check_grid(grid, layout);
    const int threads = block_size(ceil_div(rows.vectors_of_unit, kInFlight), kThreads);
    const Counters counters(1, table.bins, rows.vectors_of_unit * V);
    launch(histogram_rows_kernel<T, V>, grid, threads, counters.bytes(), stream, x, rows, table, counters, out);
}

template <class T, int V>
void count_columns(const T* x, const ChannelLayout& layout, const BinTable& table, int64_t* out,
                   cudaStream_t stream) {
    const int64_t room = std::max<int64_t>(kCounters / Counters::stride_of(table.bins), 1);  // for so many channels
    const int64_t whole = V / std::gcd(layout.inner, int64_t{V});  // whole vectors begin every so many channels
    if constexpr (V > 1) {
        if (room < whole || layout.channels % whole != 0 || !is_aligned<V>(x))
            return count_columns<T, 1>(x, layout, table, out, stream);
    }
    Columns m;
    m.rows = layout.outer;
    m.channels = layout.channels;
    m.inner = layout.inner;
    m.blocks = ceil_div(layout.channels, room / whole * whole);
    const int64_t channels = ceil_div(ceil_div(layout.channels, m.blocks), whole) * whole;
    const int64_t wanted = ceil_div(kBlocksWanted, m.blocks);
    m.rows_of_unit =
        std::max(ceil_div(m.rows, wanted), ceil_div(smallest_unit(channels * table.bins), channels * layout.inner));
    const int64_t grid = m.blocks * ceil_div(m.rows, m.rows_of_unit);
    check_grid(grid, layout);
    const Counters counters(channels, table.bins, std::min(m.rows, m.rows_of_unit) * channels * layout.inner);
    launch(histogram_columns_kernel<T, V>, grid, kThreads, counters.bytes(), stream, x, m, table, counters, out);
}

struct Cuda {
    template <class T>
    static void histogram(const Tensor& tensor, const ChannelLayout& given, const BinTable& table, int64_t* out) {
        const CurrentStream stream(tensor);
        STD_CUDA_CHECK(cudaMemsetAsync(out, 0, given.channels * table.bins * sizeof(int64_t), stream));
        if (given.numel() == 0) return;
        const T* x = static_cast<const T*>(tensor.data_ptr());
        const ChannelLayout layout = given.channels == 1 ? ChannelLayout{1, 1, given.numel()} : given;
        if (layout.inner < kShortRow && layout.channels > 1)
            return count_columns<T, 16 / sizeof(T)>(x, layout, table, out, stream);
        with_vector_width<T>(x, layout.inner,
                             [&](auto width) { count_rows<T, width>(x, layout, table, out, stream); });
    }
};

}  // namespace

PTQ4CUDA_LIBRARY_IMPL(m) { m.impl("channel_histogram", TORCH_BOX(&HistogramOps<Cuda>::channel_histogram)); }

}  // namespace ptq4cuda
