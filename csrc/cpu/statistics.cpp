// channel_statistics on the CPU.
//
// Two passes: the sum, and sums of distances from the mean. The sums are float64. No shift is needed for the first:
// where the values are close to each other and far from zero, float32 values add up exactly in float64, and where
// they are not, there is no precision to lose.
//
// The work is cut into units whose bounds depend on the shape alone, and the values of a unit are dealt to lanes in
// turn. Lanes are summed side by side, each in its own order, and added up in a fixed order: the result depends
// neither on the number of threads nor on the instruction set.
//
//   long rows (NCHW):           a unit is a stretch of one channel
//   short rows (channels_last): a unit is a stretch of pixels, with a lane for each column
//
// Eight values cost some twenty-five vector instructions, which take longer than their way from memory. So that the
// two times do not add up, the next tile is fetched while one is summed.
#include "../entry.h"
#include "simd.h"

namespace ptq4cuda {
namespace {

constexpr int64_t kLanes = 64;            // of a unit of long rows; at least of a unit of short rows
constexpr int kRows = 8;                  // values of a lane that are added up in registers
constexpr int64_t kTile = 2048;           // values
constexpr int64_t kUnit = 1 << 16;        // values of a unit of long rows
constexpr int64_t kUnits = 64;            // units of short rows, at most: enough for the threads, few to add up,
constexpr int64_t kColumnUnit = 1 << 14;  // and values of one, at least
constexpr int64_t kShortRow = 16;         // values
constexpr int64_t kGather = 512;          // values; rows that are shorter are gathered into tiles
constexpr int64_t kLarge = 1 << 16;       // values worth threads

// Both passes add kCount rows of n values, `stride` apart, to lanes j and following.

struct FirstPass {
    struct Lanes {
        double* sum;
        float *min, *max;
        int32_t* positive;
    };

    template <int kCount, class Value>
    static PTQ_INLINE void add(const Value* x, int64_t stride, int64_t j, int64_t n, const Lanes& to) {
        rows<kCount>(x, stride, n, to.sum + j, to.min + j, to.max + j, to.positive + j);
    }
    template <int kCount, class Value>
    static PTQ_INLINE void rows(const Value* __restrict x, int64_t stride, int64_t n, double* __restrict sum,
                                float* __restrict min, float* __restrict max, int32_t* __restrict positive) {
        for (int64_t j = 0; j < n; ++j) {
            double s = sum[j];
            float low = min[j], high = max[j];
            int32_t p = positive[j];
            for (int r = 0; r < kCount; ++r) {
                const float v = simd::to_float(x[r * stride + j]);
                s += v;
                low = v < low ? v : low;  // passes over NaN
                high = v > high ? v : high;
                p += v > 0.0f;
            }
            sum[j] = s;
            min[j] = low;
            max[j] = high;
            positive[j] = p;
        }
    }
};

// Deviations are taken about a centre, which is the mean unless kCentre.
template <bool kCentre>
struct SecondPass {
    struct Lanes {
        double *mean, *centre, *squares, *deviations;
    };

    template <int kCount, class Value>
    static PTQ_INLINE void add(const Value* x, int64_t stride, int64_t j, int64_t n, const Lanes& to) {
        rows<kCount>(x, stride, n, to.mean + j, to.centre + j, to.squares + j, to.deviations + j);
    }
    template <int kCount, class Value>
    static PTQ_INLINE void rows(const Value* __restrict x, int64_t stride, int64_t n, const double* __restrict mean,
                                const double* __restrict centre, double* __restrict squares,
                                double* __restrict deviations) {
        for (int64_t j = 0; j < n; ++j) {
            double q = squares[j], a = deviations[j];
            for (int r = 0; r < kCount; ++r) {
                const double v = simd::to_float(x[r * stride + j]), d = v - mean[j];
                q = __builtin_fma(d, d, q);  // on every instruction set, or they would differ
                a += std::fabs(kCentre ? v - centre[j] : d);
            }
            squares[j] = q;
            deviations[j] = a;
        }
    }
};

// Consecutive values of a unit, the first of them for lane 0, and the memory that will be read next.
template <class Value>
struct Tile {
    const Value* x;
    int64_t n;
    const char *next, *next_end;
};

// Adds a tile to its lanes. The next one is fetched in the order of its addresses, a little at a time: rows that are
// read side by side make more streams than the processor follows by itself.
template <class Pass, class Value>
struct AddTile {
    static PTQ_INLINE void run(Tile<Value> tile, int64_t width, typename Pass::Lanes lanes) {
        const int64_t rows = tile.n / width, chunks = rows / kRows * ceil_div(width, kLanes);
        const int64_t share = (tile.next_end - tile.next) / std::max<int64_t>(chunks, 1) + 1;
        const Value* x = tile.x;
        int64_t row = 0;
        for (; row + kRows <= rows; row += kRows, x += kRows * width) {
            for (int64_t j = 0; j < width; j += kLanes) {
                simd::prefetch(tile.next, tile.next_end, share);
                Pass::template add<kRows>(x + j, width, j, std::min(kLanes, width - j), lanes);
            }
        }
        for (; row < rows; ++row, x += width) Pass::template add<1>(x, width, 0, width, lanes);
        Pass::template add<1>(x, width, 0, tile.n % width, lanes);
    }
};

// What a unit adds to a channel.
struct Sums {
    double sum = 0.0, squares = 0.0, deviations = 0.0;
    int64_t positive = 0;
    float min = INFINITY, max = -INFINITY;
};

// Room for the lanes of a unit, and for a tile.
template <class Value>
struct Workspace {
    std::vector<double> sum, mean, centre, squares, deviations;
    std::vector<float> min, max;
    std::vector<int32_t> positive;
    std::vector<Value> tile;

    Workspace(int64_t width, int64_t tile_size) : tile(tile_size) {
        for (auto* lanes : {&sum, &mean, &centre, &squares, &deviations}) lanes->resize(width);
        for (auto* lanes : {&min, &max}) lanes->resize(width);
        positive.resize(width);
    }
};

// How a tensor is cut. Groups share no channel; all units of a group are needed to finish its channels. The values of
// a group are numbered, whatever lies between them in memory.
template <class T>
class Units {
    using Value = typename simd::Block<T>::Value;  // that the passes read

public:
    Units(const T* x, const ChannelLayout& layout) : x_(x), rows_(layout), inner_(layout.inner) {
        columns_ = layout.inner < kShortRow && layout.channels > 1 && layout.numel() > 0;
        if (columns_) {
            channels = layout.channels;
            rows_ = {1, 1, layout.numel()};
            // Short periods are repeated, to fill the lanes.
            const int64_t period = layout.channels * layout.inner;
            width_ = period * ceil_div(kLanes, period);
            unit_ = ceil_div(std::max(ceil_div(layout.numel(), kUnits), kColumnUnit), width_) * width_;
        }
        groups = rows_.channels;
        units = ceil_div(rows_.per_channel(), unit_);
        tile_ = std::max<int64_t>(kRows, kTile / width_) * width_;
    }

    int64_t groups, units;  // groups; units of a group
    int64_t channels = 1;   // of a group

    Workspace<Value> workspace() const { return {width_, tile_}; }

    // For each channel of the group.
    void first_pass(int64_t group, int64_t unit, Workspace<Value>& w, Sums* result) const {
        std::fill(w.sum.begin(), w.sum.end(), 0.0);
        std::fill(w.min.begin(), w.min.end(), INFINITY);
        std::fill(w.max.begin(), w.max.end(), -INFINITY);
        std::fill(w.positive.begin(), w.positive.end(), 0);
        add<FirstPass>(group, unit, w, {w.sum.data(), w.min.data(), w.max.data(), w.positive.data()});
        bool nan = false;
        for (int64_t j = 0; j < width_; ++j) {
            Sums& s = result[channel(j)];
            s.sum += w.sum[j];
            s.positive += w.positive[j];
            s.min = nan_min(s.min, w.min[j]);
            s.max = nan_max(s.max, w.max[j]);
            nan |= w.sum[j] != w.sum[j];
        }
        // Lanes whose sum is NaN met one, or infinities of both signs: look again.
        for (int64_t i = unit * unit_; nan && i < end_of(unit); ++i) {
            const float v = simd::to_float(*at(group, i));
            Sums& s = result[channel((i - unit * unit_) % width_)];
            if (v != v) s.min = s.max = v;
        }
    }

    // About values of each channel of the group; centre may be nullptr.
    void second_pass(int64_t group, int64_t unit, Workspace<Value>& w, const double* mean, const double* centre,
                     Sums* result) const {
        for (int64_t j = 0; j < width_; ++j) {
            w.mean[j] = mean[channel(j) * kStatistics];
            if (centre) w.centre[j] = centre[channel(j)];
        }
        std::fill(w.squares.begin(), w.squares.end(), 0.0);
        std::fill(w.deviations.begin(), w.deviations.end(), 0.0);
        if (centre) {
            add<SecondPass<true>>(group, unit, w,
                                  {w.mean.data(), w.centre.data(), w.squares.data(), w.deviations.data()});
        } else {
            add<SecondPass<false>>(group, unit, w,
                                   {w.mean.data(), w.centre.data(), w.squares.data(), w.deviations.data()});
        }
        for (int64_t j = 0; j < width_; ++j) {
            result[channel(j)].squares += w.squares[j];
            result[channel(j)].deviations += w.deviations[j];
        }
    }

private:
    // Of a group, by lane.
    int64_t channel(int64_t lane) const { return columns_ ? lane / inner_ % channels : 0; }

    const T* at(int64_t group, int64_t i) const {
        return x_ + (i / rows_.inner * rows_.channels + group) * rows_.inner + i % rows_.inner;
    }
    // Values from value i on that are neighbours in memory.
    int64_t neighbours(int64_t i, int64_t end) const { return std::min(end - i, rows_.inner - i % rows_.inner); }
    int64_t end_of(int64_t unit) const { return std::min((unit + 1) * unit_, rows_.per_channel()); }

    template <class Pass>
    void add(int64_t group, int64_t unit, Workspace<Value>& w, typename Pass::Lanes lanes) const {
        const int64_t end = end_of(unit);
        for (int64_t i = unit * unit_; i < end;) {
            Tile<Value> tile = tile_at(group, i, end, w.tile.data());
            i += tile.n;
            if (i < end) {
                tile.next = reinterpret_cast<const char*>(at(group, i));
                tile.next_end = tile.next + std::min(neighbours(i, end), tile_) * sizeof(T);
            }
            simd::run<AddTile<Pass, Value>>(tile, width_, lanes);
        }
    }

    // The values from value i on: where they are, or gathered into the buffer.
    Tile<Value> tile_at(int64_t group, int64_t i, int64_t end, Value* buffer) const {
        const int64_t n = std::min(tile_, end - i);
        if constexpr (std::is_same_v<T, Value>) {
            const int64_t together = neighbours(i, i + n);
            if (together >= std::min(n, kGather)) return {at(group, i), together, nullptr, nullptr};
        }
        for (int64_t k = 0, part; k < n; k += part) {
            part = neighbours(i + k, i + n);
            if constexpr (std::is_same_v<T, Value>) {
                std::copy_n(at(group, i + k), part, buffer + k);
            } else {
                simd::widen(at(group, i + k), buffer + k, part);
            }
        }
        return {buffer, n, nullptr, nullptr};
    }

    const T* x_;
    ChannelLayout rows_;  // how the values of a group lie in memory
    int64_t inner_, width_ = kLanes, unit_ = kUnit, tile_;
    bool columns_;
};

template <class T>
void reduce(const T* x, const ChannelLayout& layout, const double* centre, double* out) {
    const Units<T> units(x, layout);
    const bool large = layout.numel() > kLarge;
    const bool by_group = units.groups >= static_cast<int64_t>(torch::stable::get_num_threads());

    // Both passes over a group before the next group begins: the second read comes from cache.
    const auto finish_groups = [&](int64_t group, int64_t last_group) {
        auto mine = units.workspace();
        std::vector<Sums> sums(units.units * units.channels);
        const auto for_units = [&](const auto& f) {
            if (!large || by_group) return f(int64_t{0}, units.units, mine);
            torch::stable::parallel_for(0, units.units, 1, [&](int64_t begin, int64_t end) {
                auto its = units.workspace();
                f(begin, end, its);
            });
        };
        for (; group < last_group; ++group) {
            const int64_t first = group * units.channels;
            std::fill(sums.begin(), sums.end(), Sums());
            for_units([&](int64_t u, int64_t end, auto& w) {
                for (; u < end; ++u) units.first_pass(group, u, w, &sums[u * units.channels]);
            });
            for (int64_t c = 0; c < units.channels; ++c) {
                Sums total;
                for (int64_t u = 0; u < units.units; ++u) {
                    const Sums& s = sums[u * units.channels + c];
                    total.sum += s.sum;
                    total.positive += s.positive;
                    total.min = nan_min(total.min, s.min);
                    total.max = nan_max(total.max, s.max);
                }
                double* row = out + (first + c) * kStatistics;
                const double count = static_cast<double>(layout.per_channel()), divisor = std::max(count, 1.0);
                row[kCount] = count;
                row[kMin] = total.min;
                row[kMax] = total.max;
                row[kMean] = total.sum / divisor;
                row[kPositive] = static_cast<double>(total.positive) / divisor;
            }

            // Backwards: what was read last may still be in cache.
            for_units([&](int64_t begin, int64_t u, auto& w) {
                while (u-- > begin)
                    units.second_pass(group, u, w, out + first * kStatistics + kMean,
                                      centre ? centre + first : nullptr, &sums[u * units.channels]);
            });
            for (int64_t c = 0; c < units.channels; ++c) {
                double squares = 0.0, deviations = 0.0;
                for (int64_t u = 0; u < units.units; ++u) {
                    squares += sums[u * units.channels + c].squares;
                    deviations += sums[u * units.channels + c].deviations;
                }
                double* row = out + (first + c) * kStatistics;
                row[kM2] = squares;
                row[kAbsDev] = deviations / std::max(row[kCount], 1.0);
            }
        }
    };
    if (large && by_group) {
        torch::stable::parallel_for(0, units.groups, 1, finish_groups);
    } else {
        finish_groups(0, units.groups);
    }
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
