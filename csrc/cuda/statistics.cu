// channel_statistics on CUDA: count, min, max, mean, second moment, mean absolute deviation and fraction > 0 of each
// channel, deterministic: which values a thread adds up, and in which order, depends on shape and dtype alone.
//
// Accumulation. Each thread sums float64 differences to a value of its own unit (the shift; a large mean then costs
// no precision). Within a unit all threads share the shift, so that their sums simply add; units are merged by Chan's
// formula. A value costs a conversion and three float64 operations, which sm_80 and sm_90 finish faster than memory
// delivers it; GPUs with slow float64 units (sm_75, sm_86, sm_89, sm_120) are bound by these operations instead.
//
// Two layouts:
//   rows      long rows (NCHW). A unit is a stretch of one channel, and belongs to a block.
//   columns   short rows (channels_last). The tensor is a matrix whose columns belong to one channel each. A unit is
//             a column over a stretch of rows; a block takes 32 vectors of neighbouring columns, a thread one.
//
// The mean absolute deviation needs the mean first. Where channels are small, or as many as the device has blocks, a
// block does a whole channel: both passes in one launch, the second read from cache. Otherwise there are four
// launches: units, merge, deviations of units, merge. The deviations start with the unit that was read last and may
// still be in cache. With `centre` given, one pass does all.
#include "rows.cuh"

namespace ptq4cuda {
namespace {

constexpr int kMaximumThreads = 512;  // of a block that reads rows
constexpr int64_t kUnitsWanted = 1024;
constexpr int64_t kSmallestUnit = 1 << 13;  // values of a unit of rows

// Sums over a set of values about a shift that the whole set shares.
struct Sums {
    double sum, squares, deviations;
    uint64_t positive;
    float min, max;

    __device__ static Sums none() { return {0.0, 0.0, 0.0, 0, INFINITY, -INFINITY}; }

    __device__ void add(const Sums& other) {
        sum += other.sum;
        squares += other.squares;
        deviations += other.deviations;
        positive += other.positive;
        min = nan_min(min, other.min);
        max = nan_max(max, other.max);
    }
    __device__ Moments moments(int64_t count, float shift) const {
        return from_shifted_sums(static_cast<double>(count), shift, sum, squares, static_cast<double>(positive), min,
                                 max);
    }
};

// Sums of a thread's values of one column. kMoments and kDeviations say which of them a pass needs.
template <bool kMoments, bool kDeviations>
struct Accumulator {
    double sum = 0.0, squares = 0.0, deviations = 0.0, shift = 0.0, centre = 0.0;
    uint32_t positive = 0;

    // All but the count of what is positive.
    __device__ __forceinline__ void add(float v) {
        if constexpr (kMoments) {
            const double d = v - shift;
            sum += d;
            squares = fma(d, d, squares);
        }
        if constexpr (kDeviations) deviations += fabs(v - centre);
    }
};

// Minima and maxima of the values in a word, place by place; NaN stays.
template <class T>
struct Extremes {
    static constexpr int kPlaces = 4 / sizeof(T);
    uint32_t low, high;

    __device__ Extremes() : low(word(INFINITY)), high(word(-INFINITY)) {}

    __device__ __forceinline__ void add(uint32_t values) {
        low = min_nan_word<T>(low, values);
        high = max_nan_word<T>(high, values);
    }
    // One value; the other place keeps what it has.
    __device__ void add(float v, int place) {
        const uint32_t mask = kPlaces == 1 ? 0xffffffff : 0xffffu << 16 * place;
        low = (low & ~mask) | (min_nan_word<T>(low, word(v)) & mask);
        high = (high & ~mask) | (max_nan_word<T>(high, word(v)) & mask);
    }
    __device__ float min(int place) const { return value_in<T>(low, place); }
    __device__ float max(int place) const { return value_in<T>(high, place); }

    // A word of this value in all places.
    static __device__ __forceinline__ uint32_t word(float v) {
        if constexpr (kPlaces == 1) {
            return __float_as_uint(v);
        } else {
            return word_of_two<T>(v, v);
        }
    }
};

// Sums of a thread that reads rows: all its values are of one channel.
template <class T, int V, bool kMoments, bool kDeviations>
struct RowAccumulator : Accumulator<kMoments, kDeviations> {
    using Base = Accumulator<kMoments, kDeviations>;
    static constexpr int kBytes = V * sizeof(T);
    Extremes<T> extremes;

    __device__ RowAccumulator(double shift, double centre) {
        Base::shift = shift;
        Base::centre = centre;
    }
    __device__ __forceinline__ void add(const Words<kBytes>& in) {
#pragma unroll
        for (int j = 0; j < V; ++j) Base::add(Values<T, V>::get(in, j));
        if constexpr (kMoments) {
#pragma unroll
            for (int i = 0; i < ceil_div(kBytes, 4); ++i) {
                Base::positive += count_positive<T>(in.at[i]);
                // A half alone has no neighbour in its word.
                extremes.add(kBytes < 4 ? __byte_perm(in.at[i], 0, 0x1010) : in.at[i]);
            }
        }
    }
    __device__ Sums sums() const {
        constexpr int kLast = Extremes<T>::kPlaces - 1;
        return {Base::sum,
                Base::squares,
                Base::deviations,
                Base::positive,
                nan_min(extremes.min(0), extremes.min(kLast)),
                nan_max(extremes.max(0), extremes.max(kLast))};
    }
};

// Combines the values of the threads of a block, a power of two and at most kMaximum, for all of them.
// Shared memory has no constructors, so it is declared as numbers.
template <int kMaximum, class T, class F>
__device__ T block_reduce(T value, const F& combine) {
    __shared__ double memory[kMaximum * sizeof(T) / sizeof(double)];
    T* values = reinterpret_cast<T*>(memory);
    const int thread = threadIdx.x;
    values[thread] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half >= 32; half /= 2) {
        if (thread < half) values[thread] = combine(values[thread], values[thread + half]);
        __syncthreads();
    }
    if (thread < 32) {  // one warp is left, the others need not wait at each step
        for (int half = 16; half > 0; half /= 2) {
            if (thread < half) values[thread] = combine(values[thread], values[thread + half]);
            __syncwarp();
        }
    }
    __syncthreads();
    value = values[0];
    __syncthreads();  // all have read before the memory is used again
    return value;
}

template <int kMaximum>
__device__ Sums block_sums(const Sums& mine) {
    return block_reduce<kMaximum>(mine, [](Sums a, const Sums& b) {
        a.add(b);
        return a;
    });
}

// What the units leave behind for the merge, [splits, width] each.
struct Partials {
    Moments* moments;
    double* deviations;
};

__device__ void write_moments(double* out, const Moments& m) {
    out[kCount] = m.count;
    out[kMin] = m.min;
    out[kMax] = m.max;
    out[kMean] = m.mean;
    out[kM2] = m.m2;
    out[kPositive] = m.count > 0.0 ? m.positive / m.count : 0.0;
}

__device__ double* row_of(double* out, int64_t channel) { return out + channel * kStatistics; }

// The value that a channel's deviations are taken about: as asked, or the mean that an earlier pass left in `out`.
__device__ double centre_of(const double* centre, const double* out, int64_t channel) {
    return centre ? centre[channel] : out[channel * kStatistics + kMean];
}

// --- rows --------------------------------------------------------------------------------------------------------

// The first value of a unit; 0 if there is none.
template <class T>
__device__ float shift_of_rows(const T* x, const Rows& rows, int64_t channel, int64_t begin, int64_t end, int V) {
    if (begin >= end) return 0.0f;
    const int64_t row = begin / rows.vectors_of_row, place = begin % rows.vectors_of_row;
    return static_cast<float>(x[(row * rows.channels + channel) * rows.inner + place * V]);
}

// One block, one unit.
template <class T, int V, bool kMoments, bool kDeviations>
__global__ void __launch_bounds__(kMaximumThreads)
    rows_kernel(const T* x, Rows rows, const double* centre, const double* out, Partials partials) {
    // The later pass goes backwards.
    const int64_t unit = kMoments ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int64_t channel = unit / rows.splits, split = unit % rows.splits;
    const int64_t begin = split * rows.vectors_of_unit;
    const int64_t end = min(begin + rows.vectors_of_unit, rows.vectors_of_channel);

    const float shift = kMoments ? shift_of_rows(x, rows, channel, begin, end, V) : 0.0f;
    RowAccumulator<T, V, kMoments, kDeviations> mine(shift, kDeviations ? centre_of(centre, out, channel) : 0.0);
    add_rows<T, V>(x, rows, channel, begin, end, mine);
    const Sums total = block_sums<kMaximumThreads>(mine.sums());
    if (threadIdx.x > 0) return;
    const int64_t at = split * rows.channels + channel;
    if (kMoments) partials.moments[at] = total.moments((end - begin) * V, shift);
    if (kDeviations) partials.deviations[at] = total.deviations;
}

// One block, one channel, everything.
template <class T, int V>
__global__ void __launch_bounds__(kMaximumThreads)
    whole_channel_kernel(const T* x, Rows rows, const double* centre, double* out) {
    const int64_t channel = blockIdx.x, end = rows.vectors_of_channel;
    const float shift = shift_of_rows(x, rows, channel, 0, end, V);
    RowAccumulator<T, V, true, false> first(shift, 0.0);
    add_rows<T, V>(x, rows, channel, 0, end, first);
    const Moments moments = block_sums<kMaximumThreads>(first.sums()).moments(end * V, shift);

    RowAccumulator<T, V, false, true> second(0.0, centre ? centre[channel] : moments.mean);
    add_rows<T, V>(x, rows, channel, 0, end, second);
    const Sums total = block_sums<kMaximumThreads>(second.sums());
    if (threadIdx.x > 0) return;
    write_moments(row_of(out, channel), moments);
    row_of(out, channel)[kAbsDev] = moments.count > 0.0 ? total.deviations / moments.count : 0.0;
}

// --- columns -----------------------------------------------------------------------------------------------------

constexpr int kColumnThreads = 32;
constexpr int kRowThreads = 8;  // a block has 32 x 8 threads

struct Columns {
    int64_t count, width;  // values; columns of the matrix. The last row may be shorter.
    int64_t rows, rows_of_unit, splits;
    int64_t channels, inner;
    int64_t blocks;  // side by side
    bool aligned;

    __device__ int64_t channel(int64_t column) const { return column / inner % channels; }
};

template <class T, int V, bool kMoments, bool kDeviations>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads, 2)
    columns_kernel(const T* x, Columns m, const double* centre, const double* out, Partials partials) {
    const int64_t unit = kMoments ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int column_thread = threadIdx.x % kColumnThreads, row_thread = threadIdx.x / kColumnThreads;
    const int64_t column = (unit % m.blocks * kColumnThreads + column_thread) * V, split = unit / m.blocks;
    const int64_t begin = split * m.rows_of_unit, end = min(begin + m.rows_of_unit, m.rows);
    constexpr int kBytes = V * sizeof(T), kWords = kBytes / 4, kPlaces = Extremes<T>::kPlaces;
    constexpr int kAhead = V == 8 ? 2 : kInFlight;  // registers are short
    // Values of this thread in a row: V, or fewer in the last row.
    const auto present = [&](int64_t row) { return column < m.width ? m.count - row * m.width - column : 0; };

    Accumulator<kMoments, kDeviations> mine[V];
    Extremes<T> extremes[kWords];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        if (j >= present(begin)) continue;
        if (kMoments) mine[j].shift = static_cast<float>(x[begin * m.width + column + j]);
        if (kDeviations) mine[j].centre = centre_of(centre, out, m.channel(column + j));
    }
    const auto add = [&](const Words<kBytes>& in) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float v = Values<T, V>::get(in, j);
            mine[j].add(v);
            if (kMoments) mine[j].positive += v > 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            if (kMoments) extremes[i].add(in.at[i]);
    };
    int64_t row = begin + row_thread;
    const int64_t whole = end - (present(end - 1) < V);  // only the last row may have fewer values
    const int64_t step = kRowThreads * m.width;
    const T* from = x + row * m.width + column;
    if (column >= m.width) row = end;
    if (m.aligned) {
        for (; row + (kAhead - 1) * kRowThreads < whole; row += kAhead * kRowThreads, from += kAhead * step) {
            Words<kBytes> in[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) in[u] = load_words<kBytes>(from + u * step);
#pragma unroll
            for (int u = 0; u < kAhead; ++u) add(in[u]);
        }
    }
#pragma unroll 1  // what is left, or all
    for (; row < whole; row += kRowThreads, from += step) add(load_group<T, kBytes>(from, m.aligned));
    if (row < end) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (j >= present(row)) continue;
            const float v = static_cast<float>(from[j]);
            mine[j].add(v);
            if (kMoments) mine[j].positive += v > 0.0f;
            if (kMoments) extremes[j / kPlaces].add(v, j % kPlaces);
        }
    }

    // The threads of a column add up through shared memory, the columns of a thread one after the other.
    __shared__ double memory[kRowThreads * kColumnThreads * sizeof(Sums) / sizeof(double)];
    Sums* sums = reinterpret_cast<Sums*>(memory);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        sums[threadIdx.x] = {mine[j].sum,
                             mine[j].squares,
                             mine[j].deviations,
                             mine[j].positive,
                             extremes[j / kPlaces].min(j % kPlaces),
                             extremes[j / kPlaces].max(j % kPlaces)};
        __syncthreads();
        if (row_thread == 0 && column + j < m.width) {
            Sums total = Sums::none();
            for (int r = 0; r < kRowThreads; ++r) total.add(sums[r * kColumnThreads + column_thread]);
            const int64_t at = split * m.width + column + j;
            const int64_t rows_of_column = (m.count - column - j + m.width - 1) / m.width;
            const int64_t count = max(min(end, rows_of_column) - begin, int64_t{0});
            if (kMoments) partials.moments[at] = total.moments(count, static_cast<float>(mine[j].shift));
            if (kDeviations) partials.deviations[at] = total.deviations;
        }
        __syncthreads();
    }
}

// --- merge -------------------------------------------------------------------------------------------------------

constexpr int kMergeThreads = 128;

// Channel c owns the columns (r * channels + c) * inner + i of each of `splits` rows.
struct Owners {
    int64_t channels, inner, repeats, splits;

    __device__ int64_t count() const { return splits * repeats * inner; }
    __device__ int64_t at(int64_t channel, int64_t i) const {
        return (i / inner * channels + channel) * inner + i % inner;
    }
};

template <bool kMoments, bool kDeviations>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(Partials partials, Owners owners, double* out) {
    for (int64_t channel = blockIdx.x; channel < owners.channels; channel += gridDim.x) {
        double* row = row_of(out, channel);
        if (kMoments) {
            Moments total;
            for (int64_t i = threadIdx.x; i < owners.count(); i += blockDim.x)
                total = merge(total, partials.moments[owners.at(channel, i)]);
            total = block_reduce<kMergeThreads>(total, merge);
            if (threadIdx.x == 0) write_moments(row, total);
        }
        if (kDeviations) {
            double sum = 0.0;
            for (int64_t i = threadIdx.x; i < owners.count(); i += blockDim.x)
                sum += partials.deviations[owners.at(channel, i)];
            sum = block_reduce<kMergeThreads>(sum, [](double a, double b) { return a + b; });
            // Thread 0 wrote the count itself, here or in the launch before.
            if (threadIdx.x == 0) row[kAbsDev] = row[kCount] > 0.0 ? sum / row[kCount] : 0.0;
        }
    }
}

// --- the op ------------------------------------------------------------------------------------------------------

// Runs units and merges, in one pass or two. run_units(moments, deviations) takes two compile-time booleans.
template <class F>
void two_stages(const Tensor& x, const Owners& owners, const double* centre, double* out, cudaStream_t stream,
                const F& run_units) {
    constexpr std::true_type yes;
    constexpr std::false_type no;
    const int64_t width = owners.channels * owners.inner * owners.repeats;
    constexpr int64_t kDoubles = sizeof(Moments) / sizeof(double);
    const Tensor workspace = empty_vector(owners.splits * width * (kDoubles + 1), ScalarType::Double, x);
    double* memory = workspace.mutable_data_ptr<double>();
    const Partials partials{reinterpret_cast<Moments*>(memory), memory + owners.splits * width * kDoubles};
    const int64_t grid = std::min(owners.channels, kMaximumGrid);
    const int threads = block_size(owners.splits * owners.inner * owners.repeats, kMergeThreads);
    if (centre) {
        run_units(yes, yes, partials);
        launch(merge_kernel<true, true>, grid, threads, 0, stream, partials, owners, out);
    } else {
        run_units(yes, no, partials);
        launch(merge_kernel<true, false>, grid, threads, 0, stream, partials, owners, out);
        run_units(no, yes, partials);
        launch(merge_kernel<false, true>, grid, threads, 0, stream, partials, owners, out);
    }
}

template <class T, int V>
void reduce_rows(const Tensor& tensor, const ChannelLayout& layout, const double* centre, double* out,
                 cudaStream_t stream) {
    const T* x = static_cast<const T*>(tensor.data_ptr());
    Rows rows;
    rows.channels = layout.channels;
    rows.inner = layout.inner;
    rows.vectors_of_row = std::max<int64_t>(layout.inner / V, 1);
    rows.vectors_of_channel = layout.per_channel() / V;
    rows.aligned = is_aligned<V>(x);
    const int64_t wanted =
        std::min(ceil_div(kUnitsWanted, layout.channels), ceil_div(layout.per_channel(), kSmallestUnit));
    rows.vectors_of_unit = std::max<int64_t>(ceil_div(rows.vectors_of_channel, std::max<int64_t>(wanted, 1)), 1);
    rows.splits = std::max<int64_t>(ceil_div(rows.vectors_of_channel, rows.vectors_of_unit), 1);
    const int64_t grid = rows.channels * rows.splits;
    STD_TORCH_CHECK(grid <= kMaximumGrid, "channel_statistics: ", layout.channels,
                    " channels are too many for one launch");
    const int threads = block_size(ceil_div(rows.vectors_of_unit, kInFlight), kMaximumThreads);

    if (rows.splits == 1) {
        launch(whole_channel_kernel<T, V>, grid, threads, 0, stream, x, rows, centre, out);
        return;
    }
    two_stages(tensor, {layout.channels, 1, 1, rows.splits}, centre, out, stream,
               [&](auto moments, auto deviations, const Partials& partials) {
                   launch(rows_kernel<T, V, moments, deviations>, grid, threads, 0, stream, x, rows, centre, out,
                          partials);
               });
}

template <class T, int V>
void reduce_columns(const Tensor& tensor, const ChannelLayout& layout, const double* centre, double* out,
                    cudaStream_t stream) {
    constexpr int64_t kBlockColumns = kColumnThreads * V;
    const T* x = static_cast<const T*>(tensor.data_ptr());
    const int64_t period = layout.channels * layout.inner;
    // Short rows are repeated, to begin each matrix row with a whole vector and to fill blocks to nine tenths or
    // more.
    const int64_t whole = V / std::gcd(period, int64_t{V});
    int64_t repeats = whole;
    double best = 0.0;
    for (int64_t r = whole; r <= 16 * whole && best < 0.9; r += whole) {
        const int64_t columns = period * r;
        const double filled = static_cast<double>(columns) / (ceil_div(columns, kBlockColumns) * kBlockColumns);
        if (filled > best) {
            best = filled;
            repeats = r;
        }
    }
    Columns m;
    m.count = layout.numel();
    m.width = period * repeats;
    m.rows = ceil_div(m.count, m.width);
    m.channels = layout.channels;
    m.inner = layout.inner;
    m.blocks = ceil_div(m.width, kBlockColumns);
    m.rows_of_unit = std::max<int64_t>(ceil_div(m.rows, ceil_div(kUnitsWanted, m.blocks)), kRowThreads * kInFlight);
    m.splits = ceil_div(m.rows, m.rows_of_unit);
    m.aligned = is_aligned<V>(x);
    const int64_t grid = m.blocks * m.splits;
    STD_TORCH_CHECK(grid <= kMaximumGrid, "channel_statistics: ", layout.channels,
                    " channels are too many for one launch");
    two_stages(tensor, {layout.channels, layout.inner, repeats, m.splits}, centre, out, stream,
               [&](auto moments, auto deviations, const Partials& partials) {
                   if constexpr (V < 8 ? V * sizeof(T) == 16 || (moments && deviations) : !(moments && deviations))
                       launch(columns_kernel<T, V, moments, deviations>, grid, kColumnThreads * kRowThreads, 0,
                              stream, x, m, centre, out, partials);
               });
}

struct Cuda {
    template <class T>
    static void statistics(const Tensor& x, const ChannelLayout& given, const double* centre, double* out) {
        if (given.channels == 0) return;
        const CurrentStream stream(x);
        const ChannelLayout layout = given.channels == 1 ? ChannelLayout{1, 1, given.numel()} : given;
        if (layout.inner < kShortRow && layout.numel() > 0 && layout.channels > 1) {
            // All sums of eight columns at once would need more registers than two blocks have.
            if (centre) return reduce_columns<T, 4>(x, layout, centre, out, stream);
            return reduce_columns<T, 16 / sizeof(T)>(x, layout, centre, out, stream);
        }
        // The width follows from the shape alone, never from the address, and with it the order of the sums.
        with_vector_width<T>(nullptr, layout.inner,
                             [&](auto width) { reduce_rows<T, width>(x, layout, centre, out, stream); });
    }
};

}  // namespace

PTQ4CUDA_LIBRARY_IMPL(m) { m.impl("channel_statistics", TORCH_BOX(&StatisticsOps<Cuda>::channel_statistics)); }

}  // namespace ptq4cuda
