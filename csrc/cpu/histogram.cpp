// channel_histogram on the CPU.
//
// The bins of a batch of values are computed in vectors, and counted one by one. Counts are integers: how the work is
// cut changes nothing. It is cut into pieces of a channel's values and ranges of channels:
//
//   long rows (NCHW):           a task is a piece of one channel; there are pieces if channels are too few
//   short rows (channels_last): a task is a range of channels in a piece of the rows; there are ranges if the
//                               histograms are too large for each thread to have its own
//
// Every piece counts into a histogram of its own. They are added up at the end.
#include "../entry.h"
#include "simd.h"

namespace ptq4cuda {
namespace {

constexpr int64_t kBatch = simd::kBlock;  // values whose bins are computed at once
constexpr int64_t kTask = 1 << 15;        // values worth a thread
constexpr int64_t kWaiting = 1 << 17;     // bytes of rows in the second-level cache
constexpr int64_t kShortRow = 32;         // of values
constexpr int64_t kPadding = 16;          // bins between histograms, lest all of them compete for the same cache sets
constexpr int kCopies = 4;                // of a histogram: equal neighbours are counted in different ones
constexpr int64_t kPiece = 1 << 30;       // values that 32 bits count, whatever they are

// What is NaN goes behind the last bin, to the padding.
template <class Value>
struct RowBins {
    static PTQ_INLINE void run(const Value* __restrict x, int64_t n, Binning b, int32_t bins,
                               int32_t* __restrict places) {
        for (int64_t i = 0; i < n; ++i) {
            const int32_t place = bin(simd::to_float(x[i]), b);
            places[i] = place < 0 ? bins : place;
        }
    }
};

// Places in the histograms of neighbouring channels, of rows of n values that are `stride` apart.
template <class T>
struct ColumnBins {
    static constexpr int64_t kLine = simd::kLineOf<T>;

    static PTQ_INLINE void run(const T* x, int64_t stride, int64_t rows, int64_t n, const float* low,
                               const float* factor, const int32_t* first, int32_t bins, int32_t* places) {
        for (int64_t r = 0; r < rows; ++r, x += stride, places += n)
            n == kLine ? row(x, kLine, low, factor, first, bins, places)
                       : row(x, n, low, factor, first, bins, places);
    }
    static PTQ_INLINE void row(const T* __restrict x, int64_t n, const float* __restrict low,
                               const float* __restrict factor, const int32_t* __restrict first, int32_t bins,
                               int32_t* __restrict places) {
        const float last = static_cast<float>(bins - 1);
        for (int64_t i = 0; i < n; ++i) {
            const int32_t b = bin(simd::to_float(x[i]), {low[i], factor[i], last});
            places[i] = first[i] + (b < 0 ? bins : b);
        }
    }
};

// Counts n places, in copies of a histogram by turns, and fetches the values that come next, one for one.
template <int copies, class T>
void count(uint32_t* counts, int64_t stride, const int32_t* places, int64_t n, const T* next) {
    constexpr int64_t kLine = simd::kLineOf<T>;
    int64_t i = 0;
    for (; i + kLine <= n; i += kLine) {
        __builtin_prefetch(next + i);
        for (int64_t k = i; k < i + kLine; k += copies)
            for (int copy = 0; copy < copies; ++copy) ++counts[copy * stride + places[k + copy]];
    }
    for (; i < n; ++i) ++counts[places[i]];
}

// A histogram of one channel in several copies.
class Copies {
public:
    explicit Copies(int64_t bins) : bins_(bins), stride_(bins + kPadding), counts_(kCopies * stride_) {}

    template <class T>
    void add(const int32_t* places, int64_t n, const T* next) {
        count<kCopies>(counts_.data(), stride_, places, n, next);
    }
    void add_to(int64_t* out) {
        for (int copy = 0; copy < kCopies; ++copy)
            for (int64_t b = 0; b < bins_; ++b) out[b] += counts_[copy * stride_ + b];
        std::fill(counts_.begin(), counts_.end(), 0);
    }

private:
    int64_t bins_, stride_;
    simd::Vector<uint32_t> counts_;
};

// [pieces, channels, bins]; the first piece is the result itself.
class Pieces {
public:
    Pieces(int64_t* out, int64_t size, int64_t pieces) : out_(out), size_(size), others_(size * (pieces - 1)) {
        std::fill(out, out + size, 0);
    }
    int64_t* operator[](int64_t piece) { return piece == 0 ? out_ : others_.data() + (piece - 1) * size_; }

    void add_up() {
        if (others_.empty()) return;
        torch::stable::parallel_for(0, size_, kTask, [&](int64_t begin, int64_t end) {
            for (const int64_t* other = others_.data(); other < others_.data() + others_.size(); other += size_)
                for (int64_t i = begin; i < end; ++i) out_[i] += other[i];
        });
    }

private:
    int64_t* out_;
    int64_t size_;
    std::vector<int64_t> others_;
};

template <class T>
void count_rows(const T* x, const ChannelLayout& layout, const BinTable& table, int64_t* out) {
    const int64_t threads = torch::stable::get_num_threads(), length = layout.per_channel();
    const int64_t wanted = std::min(ceil_div(threads, layout.channels), length / std::max(kTask, 4 * table.bins));
    const int64_t pieces = std::max({wanted, ceil_div(length, kPiece), int64_t{1}});
    const int64_t step = ceil_div(length, pieces);
    Pieces counts(out, layout.channels * table.bins, pieces);
    const int64_t grain = std::max<int64_t>(1, kTask / std::max<int64_t>(step, 1));
    torch::stable::parallel_for(0, layout.channels * pieces, grain, [&](int64_t task, int64_t last_task) {
        Copies copies(table.bins);
        simd::Block<T> values;
        int32_t places[kBatch];
        for (; task < last_task; ++task) {
            const int64_t channel = task / pieces, piece = task % pieces;
            const Binning binning = table[channel];
            int64_t* to = counts[piece] + channel * table.bins;
            const bool small = step < 4 * kCopies * table.bins;  // copies would cost more than they save
            const int64_t end = std::min((piece + 1) * step, length);
            for (int64_t i = piece * step; i < end;) {
                const auto at = [&](int64_t value) {
                    return x + (value / layout.inner * layout.channels + channel) * layout.inner +
                           value % layout.inner;
                };
                const int64_t n = std::min({end - i, layout.inner - i % layout.inner, kBatch});
                const T* row = at(i);
                simd::run<RowBins<typename simd::Block<T>::Value>>(values.read(row, n, n), n, binning,
                                                                   static_cast<int32_t>(table.bins), places);
                if (small) {
                    for (int64_t k = 0; k < n; ++k)
                        if (places[k] < table.bins) ++to[places[k]];
                } else {
                    copies.add(places, n, at(i + n));
                }
                i += n;
            }
            if (!small) copies.add_to(to);
        }
    });
    counts.add_up();
}

template <class T>
void count_columns(const T* x, const ChannelLayout& layout, const BinTable& table, int64_t* out) {
    const int64_t threads = torch::stable::get_num_threads(), width = layout.channels * layout.inner;
    const int64_t stride = table.bins + kPadding;  // from one histogram to the next
    const int64_t tasks = std::clamp<int64_t>(layout.numel() / kTask, 1, threads);
    // To add up the pieces must cost less than to count.
    const int64_t wanted =
        std::clamp<int64_t>(layout.numel() / (4 * layout.channels * table.bins), 1, std::min(tasks, layout.outer));
    const int64_t pieces = std::max(wanted, ceil_div(layout.per_channel(), kPiece));
    const int64_t line = std::max<int64_t>(1, simd::kLineOf<T> / layout.inner);
    const int64_t step = std::min(std::max(ceil_div(layout.channels, ceil_div(tasks, pieces)), line),
                                  INT32_MAX / stride);  // channels of a range
    const int64_t ranges = ceil_div(layout.channels, step);
    simd::Vector<uint32_t> counts(pieces * layout.channels * stride);
    torch::stable::parallel_for(0, pieces * ranges, 1, [&](int64_t task, int64_t last_task) {
        for (; task < last_task; ++task) {
            const int64_t piece = task / ranges, channel = task % ranges * step;
            const int64_t columns = (std::min(channel + step, layout.channels) - channel) * layout.inner;
            simd::Vector<float> low, factor;
            simd::Vector<int32_t> first;
            for (int64_t i = 0; i < columns; ++i) {
                const Binning binning = table[channel + i / layout.inner];
                low.push_back(binning.low);
                factor.push_back(binning.factor);
                first.push_back(static_cast<int32_t>(i / layout.inner * stride));
            }
            // The histograms of all channels are too large for the first-level cache. So those of a few are filled
            // from many rows, which wait in the second-level cache for the next few.
            constexpr int64_t kLine = simd::kLineOf<T>, kBatchRows = kBatch / kLine;
            const int64_t block = std::max(kWaiting / (width * static_cast<int64_t>(sizeof(T))), kBatchRows);
            uint32_t* to = counts.data() + (piece * layout.channels + channel) * stride;
            const int64_t end = (piece + 1) * layout.outer / pieces;
            int32_t places[kBatch];
            for (int64_t row = piece * layout.outer / pieces; row < end; row += block) {
                const int64_t rows = std::min(block, end - row);
                // The next rows, if all of them are read here; otherwise what is at hand.
                const T* ahead = x + (row + (columns == width ? block : 0)) * width;
                for (int64_t column = 0; column < columns; column += kLine) {
                    const int64_t n = std::min(kLine, columns - column);
                    for (int64_t r = 0; r < rows; r += kBatchRows) {
                        const int64_t few = std::min(kBatchRows, rows - r);
                        simd::run<ColumnBins<T>>(x + (row + r) * width + channel * layout.inner + column, width, few,
                                                 n, low.data() + column, factor.data() + column,
                                                 first.data() + column, static_cast<int32_t>(table.bins), places);
                        count<1>(to, 0, places, few * n, ahead);
                        ahead += few * n;
                    }
                }
            }
        }
    });
    torch::stable::parallel_for(0, layout.channels, kTask / table.bins, [&](int64_t c, int64_t end) {
        for (; c < end; ++c)
            for (int64_t b = 0; b < table.bins; ++b) {
                int64_t total = 0;
                for (int64_t piece = 0; piece < pieces; ++piece)
                    total += counts[(piece * layout.channels + c) * stride + b];
                out[c * table.bins + b] = total;
            }
    });
}

struct Cpu {
    template <class T>
    static void histogram(const Tensor& x, const ChannelLayout& layout, const BinTable& table, int64_t* out) {
        const T* from = static_cast<const T*>(x.data_ptr());
        if (layout.inner < kShortRow && layout.channels > 1 && layout.numel() > 0)
            return count_columns(from, layout, table, out);
        count_rows(from, layout.channels == 1 ? ChannelLayout{1, 1, layout.numel()} : layout, table, out);
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) {
    m.impl("channel_histogram", TORCH_BOX(&HistogramOps<Cpu>::channel_histogram));
}

}  // namespace ptq4cuda
