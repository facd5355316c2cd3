// channel_statistics on the CPU.
//
// The work is cut into units whose bounds depend on the shape alone. A unit is summed in lanes, each of which belongs
// to one channel, and the lanes are merged in a fixed order: the result depends neither on the number of threads nor
// on the instruction set. Sums are float64 about a value of the unit itself (the shift), so that a large mean costs
// no precision.
//
//   long rows (NCHW):           a unit is a stretch of one channel, its elements dealt to eight lanes in turn
//   short rows (channels_last): a unit is a stretch of pixels, with a lane for each column
#include "../entry.h"
#include "simd.h"

namespace ptq4cuda {
namespace {

using simd::Double8;
using simd::Float8;
using simd::Int8;
using simd::kLanes;

constexpr int64_t kUnit = 1 << 14;  // elements of a unit of long rows
constexpr int64_t kUnits = 64;      // units of short rows, at most: enough for the threads, few to merge
constexpr int64_t kRowGroup = 16;   // short rows that are summed before their lanes go back to memory

// The alignment is spelt out: the compiler's own depends on the instruction set that a function is compiled for.
struct alignas(64) MomentLanes {
    double shift[kLanes] = {}, sum[kLanes] = {}, squares[kLanes] = {};
    Int8 positive{};
    Float8 min = Float8{} + INFINITY, max = Float8{} - INFINITY;
    int64_t count[kLanes] = {};

    Moments moments(int j) const {
        return from_shifted_sums(static_cast<double>(count[j]), shift[j], sum[j], squares[j], positive[j], min[j],
                                 max[j]);
    }
};

struct alignas(64) DeviationLanes {
    double centre[kLanes] = {}, sum[kLanes] = {};
};

// Part of a unit: `rows` rows, `stride` apart, each of `blocks` times eight values for the lanes from block `first`
// on; or, where rows is 0, `tail` < 8 values for the lanes of block `first`.
template <class T>
struct Stretch {
    const T* x;
    int64_t first, rows, stride, blocks;
    int tail;

    template <class F>  // f(value, block, lane)
    void for_each(const F& f) const {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < blocks * kLanes; ++k)
                f(simd::to_float(x[i * stride + k]), first + k / kLanes, static_cast<int>(k % kLanes));
        for (int j = 0; j < tail; ++j) f(simd::to_float(x[j]), first, j);
    }
};

PTQ_INLINE void load(const double* from, Double8& v) { std::memcpy(&v, from, sizeof v); }
PTQ_INLINE void store(const Double8& v, double* to) { std::memcpy(to, &v, sizeof v); }

template <class T>
struct AddMoments {
    static PTQ_INLINE void run(Stretch<T> part, MomentLanes* lanes) {
        const int64_t step = part.blocks > 1 ? kRowGroup : part.rows;
        for (int64_t row = 0; row < part.rows; row += step) {
            const int64_t rows = std::min(step, part.rows - row);
            for (int64_t b = 0; b < part.blocks; ++b) {
                MomentLanes& state = lanes[part.first + b];
                Double8 shift, sum, squares;
                load(state.shift, shift);
                load(state.sum, sum);
                load(state.squares, squares);
                Int8 positive = state.positive;
                Float8 min = state.min, max = state.max;
                const T* x = part.x + row * part.stride + b * kLanes;
                for (int64_t i = 0; i < rows; ++i, x += part.stride) {
                    Float8 v;
                    Double8 d;
                    simd::load(x, v);
                    simd::to_double(v, d);
                    for (int h = 0; h < 2; ++h) {
                        d.half[h] -= shift.half[h];
                        sum.half[h] += d.half[h];
                        squares.half[h] += d.half[h] * d.half[h];
                    }
                    positive -= v > 0.0f;  // true is -1
                    min = v < min ? v : min;
                    max = v > max ? v : max;
                }
                store(sum, state.sum);
                store(squares, state.squares);
                state.positive = positive;
                state.min = min;
                state.max = max;
            }
        }
        for (int64_t b = 0; b < part.blocks; ++b)
            for (int64_t& count : lanes[part.first + b].count) count += part.rows;
        MomentLanes& s = lanes[part.first];
        for (int j = 0; j < part.tail; ++j) {
            const float v = simd::to_float(part.x[j]);
            const double d = static_cast<double>(v) - s.shift[j];
            s.sum[j] += d;
            s.squares[j] += d * d;
            s.positive[j] += v > 0.0f;
            s.min[j] = v < s.min[j] ? v : s.min[j];
            s.max[j] = v > s.max[j] ? v : s.max[j];
            s.count[j] += 1;
        }
    }
};

template <class T>
struct AddDeviations {
    static PTQ_INLINE void run(Stretch<T> part, DeviationLanes* lanes) {
        const int64_t step = part.blocks > 1 ? kRowGroup : part.rows;
        for (int64_t row = 0; row < part.rows; row += step) {
            const int64_t rows = std::min(step, part.rows - row);
            for (int64_t b = 0; b < part.blocks; ++b) {
                DeviationLanes& state = lanes[part.first + b];
                Double8 centre, sum;
                load(state.centre, centre);
                load(state.sum, sum);
                const T* x = part.x + row * part.stride + b * kLanes;
                for (int64_t i = 0; i < rows; ++i, x += part.stride) {
                    Float8 v;
                    Double8 d;
                    simd::load(x, v);
                    simd::to_double(v, d);
                    for (int h = 0; h < 2; ++h) {
                        simd::Double4 distance;
                        simd::absolute(d.half[h] - centre.half[h], distance);
                        sum.half[h] += distance;
                    }
                }
                store(sum, state.sum);
            }
        }
        DeviationLanes& s = lanes[part.first];
        for (int j = 0; j < part.tail; ++j)
            s.sum[j] += std::fabs(static_cast<double>(simd::to_float(part.x[j])) - s.centre[j]);
    }
};

// How a tensor is cut. Groups share no channel; all units of a group are needed to finish its channels.
template <class T>
class Units {
public:
    Units(const T* x, const ChannelLayout& layout) : x_(x), layout_(layout) {
        columns_ = layout.inner < 2 * kLanes && layout.channels > 1 && layout.numel() > 0;
        if (columns_) {
            // Short periods are repeated until eight lanes divide them.
            const int64_t base = layout.channels * layout.inner;
            width_ = base * (kLanes / std::gcd(base, int64_t{kLanes}));
            const int64_t rows = ceil_div(layout.numel(), width_);
            rows_per_unit_ = std::max(4 * kRowGroup, ceil_div(ceil_div(rows, kUnits), kRowGroup) * kRowGroup);
            blocks = width_ / kLanes;
            groups = 1;
            units = ceil_div(rows, rows_per_unit_);
        } else {
            groups = layout.channels;
            units = ceil_div(layout.per_channel(), kUnit);
        }
    }

    int64_t groups = 0, units = 0, blocks = 1;  // units of a group, blocks of eight lanes of a unit

    int64_t channel(int64_t group, int64_t block, int lane) const {
        return columns_ ? (block * kLanes + lane) / layout_.inner % layout_.channels : group;
    }

    template <class F>
    void for_each_stretch(int64_t group, int64_t unit, const F& f) const {
        if (columns_) {
            const int64_t begin = unit * rows_per_unit_ * width_;
            const int64_t count = std::min(rows_per_unit_ * width_, layout_.numel() - begin);
            const int64_t rows = count / width_, rest = count % width_;
            const T* last = x_ + begin + rows * width_;
            if (rows) f(Stretch<T>{x_ + begin, 0, rows, width_, blocks, 0});
            if (rest >= kLanes) f(Stretch<T>{last, 0, 1, width_, rest / kLanes, 0});
            const int tail = static_cast<int>(rest % kLanes);
            if (tail) f(Stretch<T>{last + rest - tail, rest / kLanes, 0, 0, 0, tail});
            return;
        }
        const int64_t end = std::min((unit + 1) * kUnit, layout_.per_channel());
        for (int64_t i = unit * kUnit; i < end;) {
            const int64_t offset = i % layout_.inner;
            const int64_t n = std::min(end - i, layout_.inner - offset);
            const int tail = static_cast<int>(n % kLanes);
            const T* row = x_ + (i / layout_.inner * layout_.channels + group) * layout_.inner + offset;
            if (n >= kLanes) f(Stretch<T>{row, 0, n / kLanes, kLanes, 1, 0});
            if (tail) f(Stretch<T>{row + n - tail, 0, 0, 0, 0, tail});
            i += n;
        }
    }

    void moments(int64_t group, int64_t unit, MomentLanes* lanes) const {
        for_each_stretch(group, unit, [&](const Stretch<T>& part) {
            set_shifts(part, lanes);
            simd::run<AddMoments<T>>(part, lanes);
        });
        // Comparisons skip NaN. Lanes whose sum is NaN met one, or infinities of both signs: look again.
        bool nan = false;
        for (int64_t b = 0; b < blocks; ++b)
            for (int j = 0; j < kLanes; ++j) nan |= lanes[b].sum[j] != lanes[b].sum[j];
        if (!nan) return;
        for_each_stretch(group, unit, [&](const Stretch<T>& part) {
            part.for_each([&](float v, int64_t b, int j) {
                if (v != v) lanes[b].min[j] = lanes[b].max[j] = v;
            });
        });
    }

private:
    // A lane is shifted by the first value that it sees.
    void set_shifts(const Stretch<T>& part, MomentLanes* lanes) const {
        const Stretch<T> row{part.x, part.first, part.rows ? 1 : 0, part.stride, part.blocks, part.tail};
        row.for_each([&](float v, int64_t b, int j) {
            if (lanes[b].count[j] == 0) lanes[b].shift[j] = v;
        });
    }

    const T* x_;
    ChannelLayout layout_;
    bool columns_;
    int64_t width_ = 0, rows_per_unit_ = 0;
};

template <class F>
void for_range(bool parallel, int64_t n, const F& f) {
    if (!parallel) return f(int64_t{0}, n);
    torch::stable::parallel_for(0, n, 1, f);
}

template <class T>
void reduce(const T* x, const ChannelLayout& layout, const double* centre, double* out) {
    const Units<T> units(x, layout);
    const bool large = layout.numel() > 4 * kUnit;
    const bool by_group = units.groups >= static_cast<int64_t>(torch::stable::get_num_threads());

    // Both passes over a group before the next group begins: the second read comes from cache.
    for_range(large && by_group, units.groups, [&](int64_t group, int64_t end) {
        std::vector<MomentLanes> moments;
        std::vector<DeviationLanes> deviations;
        std::vector<Moments> totals;
        for (; group < end; ++group) {
            moments.assign(units.units * units.blocks, MomentLanes());
            for_range(large && !by_group, units.units, [&](int64_t u, int64_t stop) {
                for (; u < stop; ++u) units.moments(group, u, &moments[u * units.blocks]);
            });

            // A group is one channel, or all of them.
            const int64_t first = units.groups == 1 ? 0 : group;
            totals.assign(units.groups == 1 ? layout.channels : 1, Moments());
            for (int64_t i = 0; i < static_cast<int64_t>(moments.size()); ++i)
                for (int j = 0; j < kLanes; ++j) {
                    Moments& total = totals[units.channel(group, i % units.blocks, j) - first];
                    total = merge(total, moments[i].moments(j));
                }

            std::vector<DeviationLanes> start(units.blocks);
            for (int64_t b = 0; b < units.blocks; ++b)
                for (int j = 0; j < kLanes; ++j) {
                    const int64_t c = units.channel(group, b, j);
                    start[b].centre[j] = centre ? centre[c] : totals[c - first].mean;
                }
            deviations.resize(units.units * units.blocks);
            for_range(large && !by_group, units.units, [&](int64_t u, int64_t stop) {
                for (; u < stop; ++u) {
                    std::copy(start.begin(), start.end(), deviations.begin() + u * units.blocks);
                    units.for_each_stretch(group, u, [&](const Stretch<T>& part) {
                        simd::run<AddDeviations<T>>(part, &deviations[u * units.blocks]);
                    });
                }
            });

            for (int64_t i = 0; i < static_cast<int64_t>(totals.size()); ++i) {
                const Moments& m = totals[i];
                const double row[] = {m.count, m.min, m.max, m.mean, m.m2, 0.0, m.positive / std::max(m.count, 1.0)};
                std::copy(row, row + kStatistics, out + (first + i) * kStatistics);
            }
            for (int64_t i = 0; i < static_cast<int64_t>(deviations.size()); ++i)
                for (int j = 0; j < kLanes; ++j)
                    out[units.channel(group, i % units.blocks, j) * kStatistics + kAbsDev] += deviations[i].sum[j];
            for (int64_t i = 0; i < static_cast<int64_t>(totals.size()); ++i)
                out[(first + i) * kStatistics + kAbsDev] /= std::max(totals[i].count, 1.0);
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
