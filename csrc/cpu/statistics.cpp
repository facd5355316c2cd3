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
// Both passes run over a group of channels before the next group begins, so that the second reads from cache. What
// comes after is fetched meanwhile, so that the way from memory and the sums do not add up.
#include <functional>

#include "../entry.h"
#include "statistics_passes.h"

namespace ptq4cuda {
namespace {

using namespace statistics;

constexpr int64_t kTile = 4096;       // values that are added at a time, in the first-level cache
constexpr int64_t kUnit = 1 << 16;    // values of a unit of long rows
constexpr int64_t kUnits = 64;        // units of short rows, at most: enough for the threads, few to add up,
constexpr int64_t kUnitRows = 256;    // and values of a lane in one, at least
constexpr int64_t kShortRow = 16;     // values
constexpr int64_t kGather = 512;      // values; rows that are shorter are gathered into tiles
constexpr int64_t kLarge = 1 << 16;   // values worth threads
constexpr int64_t kCached = 1 << 19;  // bytes of a group, so that it and half of the next fit in a cache

// What a unit adds to a channel.
struct Sums {
    double sum = 0.0, squares = 0.0, deviations = 0.0;
    int64_t positive = 0;
    float min = INFINITY, max = -INFINITY;
};

// Room for the lanes of a unit, and for a tile.
struct Workspace {
    Lanes lanes;
    simd::Vector<float> tile;
    int64_t group = -1;  // whose values are all in the tile
};

// How a tensor is cut. Groups share no channel; all units of a group are needed to finish its channels. The values of
// a group are numbered, whatever lies between them in memory.
template <class T>
class Units {
public:
    Units(const T* x, const ChannelLayout& layout) : x_(x), rows_(layout), inner_(layout.inner) {
        columns_ = layout.inner < kShortRow && layout.channels > 1 && layout.numel() > 0;
        if (columns_) {
            channels = layout.channels;
            rows_ = {1, 1, layout.numel()};
            // Short periods are repeated, to fill the lanes.
            const int64_t period = layout.channels * layout.inner;
            width_ = period;
            while (ceil_div(width_, kLanes) * kLanes > width_ + width_ / 6 && width_ < kTile / kRows)
                width_ += period;
            tile_ = std::max<int64_t>(kRows, kTile / width_) * width_;
            unit_ = std::max(ceil_div(ceil_div(layout.numel(), kUnits), width_), kUnitRows) * width_;
        }
        groups = rows_.channels;
        units = ceil_div(rows_.per_channel(), unit_);
    }

    int64_t groups, units;  // groups; units of a group
    int64_t channels = 1;   // of a group

    Workspace workspace() const { return {Lanes(width_), simd::Vector<float>(tile_), -1}; }

    // For each channel of the group.
    void first_pass(int64_t group, int64_t unit, Workspace& w, Ahead& ahead, Sums* result) const {
        Lanes& lanes = w.lanes;
        std::fill(lanes.sum.begin(), lanes.sum.end(), 0.0);
        std::fill(lanes.min.begin(), lanes.min.end(), INFINITY);
        std::fill(lanes.max.begin(), lanes.max.end(), -INFINITY);
        std::fill(lanes.positive.begin(), lanes.positive.end(), 0);
        add<FirstPass>(group, unit, w, ahead);
        if (!columns_) {
            fold(lanes.sum, std::plus<>());
            fold(lanes.min, [](float a, float b) { return std::min(a, b); });  // no NaN came in
            fold(lanes.max, [](float a, float b) { return std::max(a, b); });
            fold(lanes.positive, std::plus<>());
        }
        bool nan = false;
        for_each_lane([&](int64_t j, int64_t c) {
            Sums& s = result[c];
            s.sum += lanes.sum[j];
            s.positive += lanes.positive[j];
            s.min = nan_min(s.min, lanes.min[j]);
            s.max = nan_max(s.max, lanes.max[j]);
            nan |= lanes.sum[j] != lanes.sum[j];
        });
        // Lanes whose sum is NaN met one, or infinities of both signs: look again.
        for (int64_t i = unit * unit_; nan && i < end_of(unit); ++i) {
            const float v = simd::to_float(*at(group, i));
            Sums& s = result[columns_ ? i / inner_ % channels : 0];
            if (v != v) s.min = s.max = v;
        }
    }

    // About values of each channel of the group; centre may be nullptr.
    void second_pass(int64_t group, int64_t unit, Workspace& w, Ahead& ahead, const double* mean,
                     const double* centre, Sums* result) const {
        Lanes& lanes = w.lanes;
        if (columns_) {
            for_each_lane([&](int64_t j, int64_t c) {
                lanes.mean[j] = mean[c * kStatistics];
                if (centre) lanes.centre[j] = centre[c];
            });
        } else {
            std::fill(lanes.mean.begin(), lanes.mean.end(), *mean);
            if (centre) std::fill(lanes.centre.begin(), lanes.centre.end(), *centre);
        }
        std::fill(lanes.squares.begin(), lanes.squares.end(), 0.0);
        std::fill(lanes.deviations.begin(), lanes.deviations.end(), 0.0);
        centre ? add<SecondPass<true>>(group, unit, w, ahead) : add<SecondPass<false>>(group, unit, w, ahead);
        if (!columns_) {
            fold(lanes.squares, std::plus<>());
            fold(lanes.deviations, std::plus<>());
        }
        for_each_lane([&](int64_t j, int64_t c) {
            result[c].squares += lanes.squares[j];
            result[c].deviations += lanes.deviations[j];
        });
    }

    // What to fetch. Where a thread finishes one group after the other, each from cache, the second pass fetches the
    // first half of the next group, and the first pass the other half of its own: two whole groups are too much for a
    // cache. Elsewhere a unit fetches its next tile.
    bool fit_cache() const { return !columns_ && rows_.per_channel() * static_cast<int64_t>(sizeof(T)) <= kCached; }
    Ahead first_ahead(int64_t group) const {
        return ahead(group, rows_.per_channel() / 2, rows_.per_channel(), rows_.per_channel());
    }
    Ahead second_ahead(int64_t group) const {
        return ahead(group + 1, 0, rows_.per_channel() / 2, rows_.per_channel());
    }
    Ahead unit_ahead(int64_t group, int64_t unit) const {
        const int64_t begin = unit * unit_, end = end_of(unit);
        return ahead(group, begin + tile_, end, end - begin);
    }

private:
    // Values of a group, while `during` values are added.
    Ahead ahead(int64_t group, int64_t begin, int64_t end, int64_t during) const {
        if (begin >= end) return {};
        const int64_t size = rows_.inner * sizeof(T),
                      lines = (end - begin) * ceil_div(size, simd::kLine) / rows_.inner;
        return {reinterpret_cast<const char*>(row_of(group, begin / rows_.inner)),
                reinterpret_cast<const char*>(at(group, begin)),
                size,
                size * rows_.channels,
                lines,
                ceil_div(kLanes * lines, during)};
    }

    // Combines all lanes of a channel in the first one, in a fixed order.
    template <class V, class F>
    static void fold(V& lanes, const F& f) {
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int j = 0; j < half; ++j) lanes[j] = f(lanes[j], lanes[j + half]);
    }

    // Calls f(lane, its channel in the group) for all lanes that hold something.
    template <class F>
    void for_each_lane(const F& f) const {
        if (!columns_) return f(0, 0);
        for (int64_t j = 0; j < width_;)
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t i = 0; i < inner_; ++i) f(j++, c);
    }

    const T* row_of(int64_t group, int64_t row) const { return x_ + (row * rows_.channels + group) * rows_.inner; }
    const T* at(int64_t group, int64_t i) const { return row_of(group, i / rows_.inner) + i % rows_.inner; }
    int64_t end_of(int64_t unit) const { return std::min((unit + 1) * unit_, rows_.per_channel()); }

    // Tile after tile: where it is if its values are neighbours in memory, or brought together. 16-bit values are
    // widened first where the passes would do it slower.
    template <class Pass>
    void add(int64_t group, int64_t unit, Workspace& w, Ahead& ahead) const {
        const int64_t begin = unit * unit_, end = end_of(unit);
        int64_t row = begin / rows_.inner, column = begin % rows_.inner;  // of value i
        for (int64_t i = begin, n; i < end; i += n) {
            n = std::min(tile_, end - i);
            const int64_t together = std::min(n, rows_.inner - column);
            const bool neighbours = together >= std::min(n, kGather);
            if (neighbours) n = together;
            if (neighbours && takes<T>()) {
                add_tile<Pass>(row_of(group, row) + column, n, width_, w.lanes, ahead);
            } else {
                if (w.group != group) gather(group, row, column, n, w.tile.data());
                w.group = n == rows_.per_channel() ? group : -1;
                add_tile<Pass>(w.tile.data(), n, width_, w.lanes, ahead);
            }
            column += n;
            if (column >= rows_.inner) {
                row += column / rows_.inner;
                column %= rows_.inner;
            }
        }
    }
    // n values from a row and column on.
    void gather(int64_t group, int64_t row, int64_t column, int64_t n, float* to) const {
        const T* from = row_of(group, row);
        for (int64_t part; n > 0; n -= part, to += part) {
            part = std::min(n, rows_.inner - column);
            if constexpr (std::is_same_v<T, float>) {
                std::copy_n(from + column, part, to);
            } else {
                simd::widen(from + column, to, part, part);
            }
            from += rows_.channels * rows_.inner;
            column = 0;
        }
    }

    const T* x_;
    ChannelLayout rows_;  // how the values of a group lie in memory
    int64_t inner_, width_ = kLanes, unit_ = kUnit, tile_ = kTile;
    bool columns_;
};

template <class T>
void reduce(const T* x, const ChannelLayout& layout, const double* centre, double* out) {
    const Units<T> units(x, layout);
    const bool large = layout.numel() > kLarge;
    const bool by_group = units.groups >= torch::stable::get_num_threads(), in_turn = by_group && units.fit_cache();

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
            Ahead ahead = units.first_ahead(group);
            for_units([&](int64_t u, int64_t end, auto& w) {
                for (Ahead its; u < end; ++u) {
                    if (!in_turn) its = units.unit_ahead(group, u);
                    units.first_pass(group, u, w, in_turn ? ahead : its, &sums[u * units.channels]);
                }
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
            if (group + 1 < last_group) ahead = units.second_ahead(group);
            for_units([&](int64_t begin, int64_t u, auto& w) {
                for (Ahead its; u-- > begin;) {
                    if (!in_turn) its = units.unit_ahead(group, u);
                    units.second_pass(group, u, w, in_turn ? ahead : its, out + first * kStatistics + kMean,
                                      centre ? centre + first : nullptr, &sums[u * units.channels]);
                }
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
