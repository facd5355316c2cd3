// channel_statistics on the CPU.
//
// The work is cut into units whose bounds depend on the shape alone. A unit is summed in kLanes lanes, each lane
// belongs to one channel, and the lanes are merged in a fixed order: the result depends neither on the number of
// threads nor on the instruction set. Sums are float64 about a value of the unit itself (the shift), so that a
// large mean costs no precision.
//
//   long rows (NCHW):           a unit is a stretch of one channel, its elements dealt to the lanes in turn
//   short rows (channels_last): a unit is kLanes neighbouring columns over a stretch of pixels
#include "../entry.h"
#include "simd.h"

namespace ptq4cuda {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kUnit = 1 << 14;        // elements of a unit, about
constexpr int64_t kColumnTile = 1 << 15;  // elements that neighbouring column units share, to stay in cache

struct Lanes {
    double shift[kLanes] = {}, count[kLanes] = {}, sum[kLanes] = {}, squares[kLanes] = {};
    float positive[kLanes] = {}, min[kLanes], max[kLanes];

    Lanes() {
        std::fill_n(min, kLanes, INFINITY);
        std::fill_n(max, kLanes, -INFINITY);
    }
    Moments moments(int j) const {
        return from_shifted_sums(count[j], shift[j], sum[j], squares[j], positive[j], min[j], max[j]);
    }
};

// `steps` times `width` values, one for each lane, `stride` elements apart; then `tail` values more.
template <class T>
struct Piece {
    const T* x;
    int64_t steps, stride;
    int width, tail;

    template <class Add>
    PTQ_INLINE void for_each(const Add& add) const {
        const T* row = x;
        if (width == kLanes) {
            for (int64_t i = 0; i < steps; ++i, row += stride)
                for (int j = 0; j < kLanes; ++j) add(j, static_cast<float>(row[j]));
        } else {
            for (int64_t i = 0; i < steps; ++i, row += stride)
                for (int j = 0; j < width; ++j) add(j, static_cast<float>(row[j]));
        }
        for (int j = 0; j < tail; ++j) add(j, static_cast<float>(row[j]));
    }
};

template <class T>
struct AddMoments {
    static PTQ_INLINE void run(Piece<T> piece, Lanes* state) {
        Lanes s = *state;
        piece.for_each([&](int j, float v) __attribute__((always_inline)) {
            const double d = static_cast<double>(v) - s.shift[j];
            s.sum[j] += d;
            s.squares[j] += d * d;
            s.positive[j] += v > 0.0f ? 1.0f : 0.0f;
            s.min[j] = v < s.min[j] ? v : s.min[j];
            s.max[j] = v > s.max[j] ? v : s.max[j];
        });
        for (int j = 0; j < piece.width; ++j) s.count[j] += static_cast<double>(piece.steps + (j < piece.tail));
        *state = s;
    }
};

// The comparisons above skip NaN. A lane whose sum is NaN met one, or infinities of both signs: look again.
template <class T>
struct MarkNaN {
    static PTQ_INLINE void run(Piece<T> piece, Lanes* state) {
        piece.for_each([&](int j, float v) {
            if (v != v) state->min[j] = state->max[j] = v;
        });
    }
};

struct Deviations {
    double centre[kLanes] = {}, sum[kLanes] = {};
};

template <class T>
struct AddDeviations {
    static PTQ_INLINE void run(Piece<T> piece, Deviations* state) {
        Deviations s = *state;
        piece.for_each([&](int j, float v) __attribute__((always_inline)) {
            s.sum[j] += std::fabs(static_cast<double>(v) - s.centre[j]);
        });
        *state = s;
    }
};

// Units of a tensor. Groups share no channel; all units of a group are needed to finish its channels.
template <class T>
class Units {
public:
    Units(const T* x, const ChannelLayout& layout)
        : x_(x), layout_(layout), columns_(layout.inner < kLanes && layout.channels > 1 && layout.numel() > 0) {
        if (columns_) {
            const int64_t base = layout.channels * layout.inner;
            width_ = base * ((kLanes + base - 1) / base);  // short periods are repeated to fill the lanes
            rows_ = (layout.numel() + width_ - 1) / width_;
            blocks_ = (width_ + kLanes - 1) / kLanes;
            rows_per_unit_ = std::clamp<int64_t>(kColumnTile / width_, 64, kUnit / kLanes);
            groups = 1;
            units = blocks_ * ((rows_ + rows_per_unit_ - 1) / rows_per_unit_);
        } else {
            groups = layout.channels;
            units = (layout.per_channel() + kUnit - 1) / kUnit;
        }
    }

    int64_t groups = 0, units = 0;  // units of one group

    int64_t channel(int64_t group, int64_t unit, int lane) const {
        if (!columns_) return group;
        return (unit % blocks_ * kLanes + lane) / layout_.inner % layout_.channels;
    }

    template <class F>
    void for_each_piece(int64_t group, int64_t unit, const F& f) const {
        if (columns_) {
            const int64_t first = unit % blocks_ * kLanes;
            const int64_t row = unit / blocks_ * rows_per_unit_;
            const int64_t steps = std::min(rows_per_unit_, rows_ - row);
            const int width = static_cast<int>(std::min<int64_t>(kLanes, width_ - first));
            // The last row of the tensor may be shorter than the others.
            const int64_t last = layout_.numel() - (row + steps - 1) * width_ - first;
            const bool whole = last >= width;
            const int tail = whole ? 0 : static_cast<int>(std::max<int64_t>(last, 0));
            f(Piece<T>{x_ + row * width_ + first, whole ? steps : steps - 1, width_, width, tail});
            return;
        }
        const int64_t end = std::min((unit + 1) * kUnit, layout_.per_channel());
        for (int64_t i = unit * kUnit; i < end;) {
            const int64_t offset = i % layout_.inner;
            const int64_t n = std::min(end - i, layout_.inner - offset);
            const T* row = x_ + (i / layout_.inner * layout_.channels + group) * layout_.inner + offset;
            f(Piece<T>{row, n / kLanes, kLanes, kLanes, static_cast<int>(n % kLanes)});
            i += n;
        }
    }

    Lanes moments(int64_t group, int64_t unit) const {
        Lanes lanes;
        bool first = true;
        for_each_piece(group, unit, [&](const Piece<T>& piece) {
            if (first) {
                const int present = piece.steps > 0 ? piece.width : piece.tail;
                for (int j = 0; j < (columns_ ? present : kLanes); ++j)
                    lanes.shift[j] = static_cast<float>(piece.x[columns_ ? j : 0]);
                first = false;
            }
            simd::run<AddMoments<T>>(piece, &lanes);
        });
        if (std::any_of(lanes.sum, lanes.sum + kLanes, [](double s) { return s != s; }))
            for_each_piece(group, unit, [&](const Piece<T>& piece) { MarkNaN<T>::run(piece, &lanes); });
        return lanes;
    }

private:
    const T* x_;
    ChannelLayout layout_;
    bool columns_;
    int64_t width_ = 0, rows_ = 0, blocks_ = 1, rows_per_unit_ = 0;
};

void for_range(bool parallel, int64_t n, int64_t grain, const auto& f) {
    if (!parallel) return f(0, n);
    torch::stable::parallel_for(0, n, grain, f);
}

template <class T>
void reduce(const T* x, const ChannelLayout& layout, const double* centre, double* out) {
    const Units<T> units(x, layout);
    const int64_t grain = std::max<int64_t>(1, 2 * kUnit * units.groups / std::max<int64_t>(layout.numel(), 1));
    const bool by_group = units.groups >= static_cast<int64_t>(torch::stable::get_num_threads());

    // Both passes over one group before the next group begins: the second read comes from cache.
    for_range(by_group, units.groups, grain, [&](int64_t group, int64_t end) {
        std::vector<Lanes> lanes(units.units);
        std::vector<Deviations> deviations(units.units);
        for (; group < end; ++group) {
            for_range(!by_group, units.units, 1, [&](int64_t u, int64_t stop) {
                for (; u < stop; ++u) lanes[u] = units.moments(group, u);
            });
            std::vector<Moments> totals(units.groups == 1 ? layout.channels : 1);
            const auto index = [&](int64_t channel) { return units.groups == 1 ? channel : 0; };
            for (int64_t u = 0; u < units.units; ++u)
                for (int j = 0; j < kLanes; ++j) {
                    Moments& total = totals[index(units.channel(group, u, j))];
                    total = merge(total, lanes[u].moments(j));
                }
            const auto centre_of = [&](int64_t channel) {
                return centre ? centre[channel] : totals[index(channel)].mean;
            };
            for_range(!by_group, units.units, 1, [&](int64_t u, int64_t stop) {
                for (; u < stop; ++u) {
                    Deviations d;
                    for (int j = 0; j < kLanes; ++j) d.centre[j] = centre_of(units.channel(group, u, j));
                    units.for_each_piece(group, u,
                                         [&](const Piece<T>& piece) { simd::run<AddDeviations<T>>(piece, &d); });
                    deviations[u] = d;
                }
            });
            const auto row_of = [&](int64_t channel) { return out + channel * kStatistics; };
            for (int64_t i = 0; i < static_cast<int64_t>(totals.size()); ++i) {
                const Moments& m = totals[i];
                double* row = row_of(units.groups == 1 ? i : group);
                row[kCount] = m.count;
                row[kMin] = m.min;
                row[kMax] = m.max;
                row[kMean] = m.mean;
                row[kM2] = m.m2;
                row[kAbsDev] = 0.0;
                row[kPositive] = m.count > 0.0 ? m.positive / m.count : 0.0;
            }
            for (int64_t u = 0; u < units.units; ++u)
                for (int j = 0; j < kLanes; ++j) row_of(units.channel(group, u, j))[kAbsDev] += deviations[u].sum[j];
            for (int64_t i = 0; i < static_cast<int64_t>(totals.size()); ++i)
                if (totals[i].count > 0.0) row_of(units.groups == 1 ? i : group)[kAbsDev] /= totals[i].count;
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
