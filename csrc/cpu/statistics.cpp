// channel_statistics on the CPU.
//
// The work is cut into units whose bounds depend on the shape alone, and the values of a unit are dealt to lanes in
// turn. Lanes are summed side by side, each in its own order, and merged in a fixed order: the result depends neither
// on the number of threads nor on the instruction set. Sums are float64 about a value of the unit itself, so that a
// large mean costs no precision.
//
//   long rows (NCHW):           a unit is a stretch of one channel; its lanes share what they are summed about
//   short rows (channels_last): a unit is a stretch of pixels, with a lane for each column
//
// The two passes over a value cost some three vector instructions each, nearly the time that memory takes to deliver
// it. So a tile is summed while the next one is on its way.
#include "../entry.h"
#include "simd.h"

namespace ptq4cuda {
namespace {

constexpr int64_t kLanes = 64;       // of a unit of long rows; at least of a unit of short rows
constexpr int kRows = 8;             // values of a lane that are added up in registers
constexpr int64_t kTile = 2048;      // values
constexpr int64_t kUnit = 1 << 16;   // values of a unit of long rows
constexpr int64_t kUnits = 64;       // units of short rows, at most: enough for the threads, few to merge
constexpr int64_t kShortRow = 16;    // values
constexpr int64_t kGather = 512;     // values; rows that are shorter are gathered into tiles
constexpr int64_t kLarge = 1 << 16;  // values worth threads

struct LanePointers {
    double *about, *sum, *squares;
    int32_t* positive;
    float *min, *max;
};

// What lanes are summed about, and their sums. Deviations use the first two.
struct Lanes {
    std::vector<double> about, sum, squares;
    std::vector<int32_t> positive;
    std::vector<float> min, max;
    std::vector<float> tile;  // room for one that is gathered

    Lanes(int64_t width, int64_t tile_)
        : about(width), sum(width), squares(width), positive(width), min(width), max(width), tile(tile_) {}

    LanePointers cleared() {
        std::fill(sum.begin(), sum.end(), 0.0);
        std::fill(squares.begin(), squares.end(), 0.0);
        std::fill(positive.begin(), positive.end(), 0);
        std::fill(min.begin(), min.end(), INFINITY);
        std::fill(max.begin(), max.end(), -INFINITY);
        return {about.data(), sum.data(), squares.data(), positive.data(), min.data(), max.data()};
    }
};

// Adds kCount rows of n values, `stride` apart, to n lanes.
struct AddMoments {
    template <int kCount>
    static PTQ_INLINE void rows(const float* __restrict x, int64_t stride, int64_t n, const double* __restrict about,
                                double* __restrict sum, double* __restrict squares, int32_t* __restrict positive,
                                float* __restrict min, float* __restrict max) {
        for (int64_t j = 0; j < n; ++j) {
            double s = sum[j], q = squares[j];
            int32_t p = positive[j];
            float low = min[j], high = max[j];
            for (int r = 0; r < kCount; ++r) {
                const float v = x[r * stride + j];
                const double d = static_cast<double>(v) - about[j];
                s += d;
                q = __builtin_fma(d, d, q);  // on every instruction set, or they would differ
                p += v > 0.0f;
                low = v < low ? v : low;  // passes over NaN
                high = v > high ? v : high;
            }
            sum[j] = s;
            squares[j] = q;
            positive[j] = p;
            min[j] = low;
            max[j] = high;
        }
    }
};

struct AddDeviations {
    template <int kCount>
    static PTQ_INLINE void rows(const float* __restrict x, int64_t stride, int64_t n, const double* __restrict about,
                                double* __restrict sum, double*, int32_t*, float*, float*) {
        for (int64_t j = 0; j < n; ++j) {
            double s = sum[j];
            for (int r = 0; r < kCount; ++r) s += std::fabs(static_cast<double>(x[r * stride + j]) - about[j]);
            sum[j] = s;
        }
    }
};

// Consecutive values of a unit as float32, the first of them for lane 0, and the memory that will be read next.
struct Tile {
    const float* x;
    int64_t n;
    const char *next, *next_end;
};

// Adds a tile to its lanes. The next one is fetched in the order of its addresses, a little at a time: rows that are
// read side by side make more streams than the processor follows by itself.
template <class Add>
struct AddTile {
    static PTQ_INLINE void run(Tile tile, int64_t width, LanePointers lanes) {
        const int64_t rows = tile.n / width, rest = tile.n % width;
        int64_t row = 0;
        for (; row + kRows <= rows; row += kRows) {
            for (int64_t j = 0; j < width; j += kLanes) {
                const int64_t n = std::min(kLanes, width - j);
                simd::prefetch(tile.next, tile.next_end, n * kRows * static_cast<int64_t>(sizeof(float)));
                add<kRows>(tile.x + row * width, width, j, n, lanes);
            }
        }
        for (; row < rows; ++row) add<1>(tile.x + row * width, width, 0, width, lanes);
        add<1>(tile.x + rows * width, width, 0, rest, lanes);
    }

private:
    template <int kCount>
    static PTQ_INLINE void add(const float* x, int64_t stride, int64_t j, int64_t n, const LanePointers& lanes) {
        Add::template rows<kCount>(x + j, stride, n, lanes.about + j, lanes.sum + j, lanes.squares + j,
                                   lanes.positive + j, lanes.min + j, lanes.max + j);
    }
};

// How a tensor is cut. Groups share no channel; all units of a group are needed to finish its channels. The values of
// a group are numbered, whatever lies between them in memory.
template <class T>
class Units {
public:
    Units(const T* x, const ChannelLayout& layout) : layout(layout), x_(x), rows_(layout) {
        columns = layout.inner < kShortRow && layout.channels > 1 && layout.numel() > 0;
        if (columns) {
            // Short periods are repeated, to fill the lanes.
            const int64_t period = layout.channels * layout.inner;
            width = period * ceil_div(kLanes, period);
            channels = layout.channels;
            rows_ = {1, 1, layout.numel()};
            unit_ = std::max<int64_t>(4 * kRows, ceil_div(ceil_div(layout.numel(), width), kUnits)) * width;
        }
        groups = rows_.channels;
        units = ceil_div(rows_.per_channel(), unit_);
        tile_ = std::max<int64_t>(kRows, kTile / width) * width;
    }

    ChannelLayout layout;
    bool columns;
    int64_t groups, units;   // groups; units of a group
    int64_t width = kLanes;  // lanes of a unit
    int64_t channels = 1;    // of a group

    // Of a group, by lane.
    int64_t channel(int64_t lane) const { return columns ? lane / layout.inner % channels : 0; }

    Lanes lanes() const { return Lanes(width, tile_); }

    // Of each channel of the group. Its lanes are summed about the same value, so that their sums simply add.
    void moments(int64_t group, int64_t unit, Lanes& lanes, Moments* result) const {
        const int64_t begin = unit * unit_, end = end_of(unit);
        for (int64_t j = 0; j < width; ++j) {
            const int64_t first = begin + (columns ? channel(j) * layout.inner : 0);
            lanes.about[j] = first < end ? simd::to_float(*at(group, first)) : 0.0;
        }
        add<AddMoments>(group, unit, lanes);

        // Lanes whose sum is NaN met one, or infinities of both signs: look again.
        if (std::any_of(lanes.sum.begin(), lanes.sum.end(), [](double s) { return s != s; }))
            mark_nan(group, unit, lanes);

        const int64_t rows = (end - begin) / width, rest = (end - begin) % width;
        std::fill_n(result, channels, Moments());
        for (int64_t j = 0; j < width; ++j) {
            Moments& m = result[channel(j)];
            m.count += static_cast<double>(rows + (j < rest));
            m.mean += lanes.sum[j];
            m.m2 += lanes.squares[j];
            m.positive += lanes.positive[j];
            m.min = nan_min(m.min, lanes.min[j]);
            m.max = nan_max(m.max, lanes.max[j]);
        }
        for (int64_t j = 0; j < (columns ? channels * layout.inner : 1); j += layout.inner) {
            Moments& m = result[channel(j)];
            m = from_shifted_sums(m.count, lanes.about[j], m.mean, m.m2, m.positive, m.min, m.max);
        }
    }

    // About lanes.about, for each channel of the group.
    void deviations(int64_t group, int64_t unit, Lanes& lanes, double* result) const {
        add<AddDeviations>(group, unit, lanes);
        std::fill_n(result, channels, 0.0);
        for (int64_t j = 0; j < width; ++j) result[channel(j)] += lanes.sum[j];
    }

private:
    const T* at(int64_t group, int64_t i) const {
        return x_ + (i / rows_.inner * rows_.channels + group) * rows_.inner + i % rows_.inner;
    }
    // Values from value i on that are neighbours in memory.
    int64_t neighbours(int64_t i, int64_t end) const { return std::min(end - i, rows_.inner - i % rows_.inner); }
    int64_t end_of(int64_t unit) const { return std::min((unit + 1) * unit_, rows_.per_channel()); }

    template <class Add>
    void add(int64_t group, int64_t unit, Lanes& lanes) const {
        const LanePointers pointers = lanes.cleared();
        const int64_t end = end_of(unit);
        for (int64_t i = unit * unit_; i < end;) {
            Tile tile = tile_at(group, i, end, lanes.tile.data());
            i += tile.n;
            if (i < end) {
                tile.next = reinterpret_cast<const char*>(at(group, i));
                tile.next_end = tile.next + std::min(neighbours(i, end), tile_) * sizeof(T);
            }
            simd::run<AddTile<Add>>(tile, width, pointers);
        }
    }

    // The values from value i on: where they are, or gathered into the buffer.
    Tile tile_at(int64_t group, int64_t i, int64_t end, float* buffer) const {
        const int64_t n = std::min(tile_, end - i);
        if constexpr (std::is_same_v<T, float>) {
            const int64_t together = neighbours(i, i + n);
            if (together >= std::min(n, kGather)) return {at(group, i), together, nullptr, nullptr};
        }
        for (int64_t k = 0, part; k < n; k += part) {
            part = neighbours(i + k, i + n);
            simd::widen(at(group, i + k), buffer + k, part);
        }
        return {buffer, n, nullptr, nullptr};
    }

    void mark_nan(int64_t group, int64_t unit, Lanes& lanes) const {
        const int64_t begin = unit * unit_, end = end_of(unit);
        for (int64_t i = begin; i < end; ++i) {
            const float v = simd::to_float(*at(group, i));
            const int64_t j = columns ? (i - begin) % width : 0;
            if (v != v) lanes.min[j] = lanes.max[j] = v;
        }
    }

    const T* x_;
    ChannelLayout rows_;  // how the values of a group lie in memory
    int64_t unit_ = kUnit, tile_;
};

template <class F>
void for_range(bool parallel, int64_t n, const F& f) {
    if (!parallel) return f(int64_t{0}, n);
    torch::stable::parallel_for(0, n, 1, f);
}

template <class T>
void reduce(const T* x, const ChannelLayout& layout, const double* centre, double* out) {
    const Units<T> units(x, layout);
    const bool large = layout.numel() > kLarge;
    const bool by_group = units.groups >= static_cast<int64_t>(torch::stable::get_num_threads());

    // Both passes over a group before the next group begins: the second read comes from cache.
    for_range(large && by_group, units.groups, [&](int64_t group, int64_t last_group) {
        std::vector<Moments> moments(units.units * units.channels);
        std::vector<double> deviations(units.units * units.channels);
        for (; group < last_group; ++group) {
            const int64_t first = group * units.channels;
            for_range(large && !by_group, units.units, [&](int64_t u, int64_t end) {
                Lanes lanes = units.lanes();
                for (; u < end; ++u) units.moments(group, u, lanes, &moments[u * units.channels]);
            });
            for (int64_t c = 0; c < units.channels; ++c) {
                Moments m;
                for (int64_t u = 0; u < units.units; ++u) m = merge(m, moments[u * units.channels + c]);
                const double row[] = {m.count, m.min, m.max, m.mean, m.m2, 0.0, m.positive / std::max(m.count, 1.0)};
                std::copy(row, row + kStatistics, out + (first + c) * kStatistics);
            }

            // Backwards: what was read last may still be in cache.
            for_range(large && !by_group, units.units, [&](int64_t begin, int64_t u) {
                Lanes lanes = units.lanes();
                for (int64_t j = 0; j < units.width; ++j) {
                    const int64_t c = first + units.channel(j);
                    lanes.about[j] = centre ? centre[c] : out[c * kStatistics + kMean];
                }
                while (u-- > begin) units.deviations(group, u, lanes, &deviations[u * units.channels]);
            });
            for (int64_t c = 0; c < units.channels; ++c) {
                double sum = 0.0;
                for (int64_t u = 0; u < units.units; ++u) sum += deviations[u * units.channels + c];
                double* row = out + (first + c) * kStatistics;
                row[kAbsDev] = sum / std::max(row[kCount], 1.0);
            }
        }
    });
}

struct Cpu {
    template <class T>
    static void statistics(const Tensor& x, const ChannelLayout& layout, const double* centre, double* out) {
        reduce(static_cast<const T*>(x.data_ptr()), layout, centre, out);
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) {
    m.impl("channel_statistics", TORCH_BOX(&StatisticsOps<Cpu>::channel_statistics));
}

}  // namespace ptq4cuda
