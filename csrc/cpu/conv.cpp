// conv2d_integer on the CPU: integer sums tile by tile (conv_tiles.h), finished while they are in cache.
//
// The work is cut into units of neighbouring output pixels. A unit's input stays in the second-level cache while the
// panels of weights pass by one after the other, and a panel stays in the first-level cache while it meets all tiles
// of the unit. Nothing is unfolded: a tile reads each tap of its pixels where it lies. Where the image is padded, the
// rows that a unit needs are copied into a band with zeros around them.
#include <vector>

#include "conv_tiles.h"

namespace ptq4cuda {
namespace {

constexpr int64_t kUnitBytes = 64 << 10;    // of input
constexpr int64_t kUnitPixels = 384;        // at most
constexpr int64_t kMinimumUnitPixels = 24;  // less does not pay for reading all weights
constexpr int64_t kTaskProducts = 1 << 18;  // worth a thread
constexpr int64_t kTasksPerThread = 4;

// The parameters of all output channels as arrays, every panel filled up to 16.
struct Parameters {
    const float *scale, *bias;
    const float *residual_scale, *residual_zero_point;
    const float *inv_scale, *zero_point, *qmax;
};
constexpr int kFields = 7;

// --- from sums to outputs
// --------------------------------------------------------------------------------------------

enum class Curve { identity, relu, other };

template <class T, bool kResidual, Curve curve>
struct Finish {
    static PTQ_INLINE void run(const int32_t* __restrict sums, int64_t pixels, int64_t stride,
                               const uint8_t* __restrict residual, T* __restrict y, Parameters of, Activation act) {
        for (int64_t p = 0; p < pixels; ++p, sums += kPanelOutputs, residual += stride, y += stride)
            for (int o = 0; o < kPanelOutputs; ++o) {
                float v = scaled_sum(sums[o], of.scale[o], of.bias[o]);
                if (kResidual)
                    v += value(static_cast<float>(residual[o]),
                               Quantizer{0.0f, of.residual_scale[o], of.residual_zero_point[o], 0.0f});
                if (curve == Curve::relu) v = v > 0.0f ? v : 0.0f;
                if (curve == Curve::other) v = activated(v, act.negative_slope, act.upper);
                if constexpr (std::is_same_v<T, uint8_t>) {
                    y[o] = code(v, Quantizer{of.inv_scale[o], 0.0f, of.zero_point[o], of.qmax[o]});
                } else {
                    simd::store(v, y[o]);
                }
            }
    }
};

template <class T>
using Finisher = void (*)(const int32_t*, int64_t, int64_t, const uint8_t*, T*, Parameters, Activation);

template <class T, bool kResidual>
Finisher<T> finisher(const Activation& act) {
    const bool unbounded = act.upper == INFINITY;
    if (unbounded && act.negative_slope == 1.0f) return &simd::run<Finish<T, kResidual, Curve::identity>>;
    if (unbounded && act.negative_slope == 0.0f) return &simd::run<Finish<T, kResidual, Curve::relu>>;
    return &simd::run<Finish<T, kResidual, Curve::other>>;
}

// --- the convolution
// -------------------------------------------------------------------------------------------------

template <class T>
class Convolution {
public:
    Convolution(const ConvProblem& problem, T* y)
        : problem_(problem), shape_(problem.shape), y_(y), depthwise_(problem.shape.depthwise()) {
        const bool words = depthwise_ || shape_.group_channels() % kWordChannels == 0;
        direct_ = words && shape_.padding.height + shape_.padding.width == 0;
        row_bytes_ = (shape_.in.width + (direct_ ? 0 : 2 * shape_.padding.width)) * shape_.channels;
        find_taps();
        lay_out_parameters();
        if (depthwise_) interleave_weights();
        finish_ = problem.residual ? finisher<T, true>(problem.activation) : finisher<T, false>(problem.activation);
#if defined(__x86_64__)
        if (simd::level() >= simd::Level::avx2) {
            dot_ = dot_tile_avx2;
            if (shape_.channels >= kBlock) depthwise_dot_ = depthwise_tile_avx2;
        }
#endif
    }

    void run() const {
        const Extent out = shape_.out;
        const int64_t read = shape_.channels * shape_.stride.area();
        int64_t pixels = std::clamp(kUnitBytes / read, kMinimumUnitPixels, kUnitPixels);
        const int64_t bands = ceil_div(out.height, std::clamp<int64_t>(pixels / out.width, 1, out.height));
        const int64_t rows = ceil_div(out.height, bands);
        const int64_t units = direct_ ? ceil_div(shape_.pixels(), pixels) : shape_.batch * ceil_div(out.height, rows);
        if (!direct_) pixels = rows * out.width;

        // Where units are few, their panels are shared out, too.
        const int64_t wanted = torch::stable::get_num_threads() * kTasksPerThread;
        const int64_t parts = std::clamp<int64_t>(ceil_div(wanted, units), 1, blocks());
        const int64_t products =
            ceil_div(pixels * shape_.out_channels, parts) * shape_.kernel.area() * shape_.group_channels();
        torch::stable::parallel_for(0, units * parts, kTaskProducts / products + 1, [&](int64_t task, int64_t end) {
            Unit unit;
            for (int64_t held = -1; task < end; ++task) {
                const int64_t u = task / parts, part = task % parts;
                if (u != held) direct_ ? take_pixels(u * pixels, pixels, unit) : take_band(u, rows, unit);
                held = u;
                for (int64_t b = blocks() * part / parts; b < blocks() * (part + 1) / parts; ++b)
                    depthwise_ ? depthwise_block(unit, b) : panel(unit, b);
            }
        });
    }

private:
    // Taps of a pixel that are inside of the image: [top, bottom) x [left, right).
    struct Window {
        int64_t top, bottom, left, right;
    };
    struct Unit {
        int64_t first = 0;                   // output pixel; the others follow
        std::vector<const uint8_t*> pixels;  // where each of them reads its first tap
        std::vector<Window> windows;         // of each of them, if zero points have a share
        std::vector<uint8_t> band;
    };

    int64_t blocks() const {
        if (depthwise_) return ceil_div(shape_.channels, kBlock);
        return shape_.groups * shape_.panels_per_group();
    }
    int64_t padded_outputs() const { return blocks() * (depthwise_ ? kBlock : kPanelOutputs); }

    void find_taps() {
        const Extent k = shape_.kernel, d = shape_.dilation;
        // The taps of a row follow each other in memory, as their weights do.
        const bool joined = !depthwise_ && shape_.groups == 1 && d.width == 1 && shape_.channels % kWordChannels == 0;
        for (int64_t r = 0; r < k.height; ++r)
            for (int64_t s = 0; s < (joined ? 1 : k.width); ++s)
                offsets_.push_back(r * d.height * row_bytes_ + s * d.width * shape_.channels);
        taps_ = {offsets_.data(), static_cast<int64_t>(offsets_.size()),
                 shape_.words_per_tap() * (joined ? k.width : 1)};
        if (depthwise_ && offsets_.size() % 2) offsets_.push_back(0);
    }

    // The place of output channel o among filled panels.
    int64_t padded(int64_t o) const {
        if (depthwise_) return o;
        const int64_t n = shape_.group_outputs();
        return o / n * shape_.panels_per_group() * kPanelOutputs + o % n;
    }

    void lay_out_parameters() {
        const int64_t outputs = padded_outputs(), area = shape_.kernel.area();
        fields_.assign(kFields * outputs, 0.0f);
        if (problem_.zero_sums) {
            zeros_.assign(area * outputs, 0);
            all_zeros_.assign(outputs, 0);
        }
        for (int64_t o = 0; o < shape_.out_channels; ++o) {
            const int64_t at = padded(o);
            const Quantizer added = problem_.residual ? problem_.residual_quantizer[o] : Quantizer{};
            const Quantizer out = problem_.out_quantizer.scale ? problem_.out_quantizer[o] : Quantizer{};
            const float values[kFields] = {problem_.scale[o], problem_.bias[o], added.scale, added.zero_point,
                                           out.inv_scale,     out.zero_point,   out.qmax};
            for (int f = 0; f < kFields; ++f) fields_[f * outputs + at] = values[f];
            for (int64_t t = 0; problem_.zero_sums && t < area; ++t) {
                zeros_[t * outputs + at] = problem_.zero_sums[t * shape_.out_channels + o];
                all_zeros_[at] += zeros_[t * outputs + at];
            }
        }
    }

    Parameters parameters(int64_t at) const {
        const auto field = [&](int f) { return fields_.data() + f * padded_outputs() + at; };
        return {field(0), field(1), field(2), field(3), field(4), field(5), field(6)};
    }

    // [R * S, C] to [blocks][pairs of taps][2][kBlock]. The last block of 32 channels starts early enough to be full.
    void interleave_weights() {
        const int64_t area = shape_.kernel.area(), pairs = ceil_div(area, 2);
        weights_.assign(blocks() * pairs * 2 * kBlock, 0);
        for (int64_t b = 0; b < blocks(); ++b)
            for (int64_t t = 0; t < area; ++t)
                for (int64_t c = 0; c < std::min<int64_t>(kBlock, shape_.channels); ++c)
                    weights_[(b * pairs * 2 + t) * kBlock + c] =
                        problem_.weight[t * shape_.channels + first_channel(b) + c];
    }
    int64_t first_channel(int64_t block) const {
        return std::max<int64_t>(0, std::min(block * kBlock, shape_.channels - kBlock));
    }

    // --- the input of a unit

    void take_pixels(int64_t first, int64_t count, Unit& unit) const {
        const Extent out = shape_.out;
        unit.first = first;
        unit.pixels.clear();
        for (int64_t i = first; i < std::min(first + count, shape_.pixels()); ++i) {
            const int64_t row = i / out.width % out.height * shape_.stride.height, n = i / out.area();
            const int64_t column = i % out.width * shape_.stride.width;
            unit.pixels.push_back(problem_.x + (n * shape_.in.height + row) * row_bytes_ + column * shape_.channels);
        }
        unit.windows.assign(problem_.zero_sums ? unit.pixels.size() : 0,
                            {0, shape_.kernel.height, 0, shape_.kernel.width});
    }

    void take_band(int64_t u, int64_t rows, Unit& unit) const {
        const Extent in = shape_.in, out = shape_.out, stride = shape_.stride, pad = shape_.padding;
        const int64_t bands = ceil_div(out.height, rows), n = u / bands, top = u % bands * rows;
        const int64_t bottom = std::min(top + rows, out.height), left = pad.width * shape_.channels;
        const int64_t height =
            (bottom - top - 1) * stride.height + shape_.dilation.height * (shape_.kernel.height - 1) + 1;
        unit.band.assign(height * row_bytes_ + kBlock, 0);  // the last word may reach beyond the last channel
        for (int64_t i = 0; i < height; ++i) {
            const int64_t row = top * stride.height - pad.height + i;
            if (row < 0 || row >= in.height) continue;
            const int64_t bytes = in.width * shape_.channels;
            std::memcpy(unit.band.data() + i * row_bytes_ + left, problem_.x + (n * in.height + row) * bytes, bytes);
        }
        unit.first = (n * out.height + top) * out.width;
        unit.pixels.clear();
        unit.windows.clear();
        for (int64_t r = 0; r < bottom - top; ++r)
            for (int64_t c = 0; c < out.width; ++c) {
                unit.pixels.push_back(unit.band.data() + r * stride.height * row_bytes_ +
                                      c * stride.width * shape_.channels);
                if (problem_.zero_sums) unit.windows.push_back(window((top + r) * stride.height, c * stride.width));
            }
    }

    // Row and column are those of the first tap in the padded image.
    Window window(int64_t row, int64_t column) const {
        const auto inside = [](int64_t first, int64_t pad, int64_t size, int64_t step, int64_t count) {
            const int64_t before = std::clamp<int64_t>(ceil_div(pad - first, step), 0, count);
            const int64_t end = std::clamp<int64_t>(ceil_div(pad + size - first, step), before, count);
            return std::pair(before, end);
        };
        const auto [top, bottom] =
            inside(row, shape_.padding.height, shape_.in.height, shape_.dilation.height, shape_.kernel.height);
        const auto [left, right] =
            inside(column, shape_.padding.width, shape_.in.width, shape_.dilation.width, shape_.kernel.width);
        return {top, bottom, left, right};
    }

    // --- the sums of a unit

    // Calls f(first pixel of the unit, pixels) for tiles of nearly equal size.
    template <class F>
    void for_each_tile(const Unit& unit, const F& f) const {
        const int64_t count = unit.pixels.size(), tiles = ceil_div(count, kTilePixels);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t begin = count * t / tiles;
            f(begin, static_cast<int>(count * (t + 1) / tiles - begin));
        }
    }

    void panel(const Unit& unit, int64_t index) const {
        const int64_t per_group = shape_.panels_per_group(), group = index / per_group, in_group = index % per_group;
        const int64_t output = group * shape_.group_outputs() + in_group * kPanelOutputs;
        const int outputs =
            static_cast<int>(std::min<int64_t>(kPanelOutputs, shape_.group_outputs() - in_group * kPanelOutputs));
        const int8_t* weights = problem_.weight + index * shape_.panel_words() * kPanelOutputs * kWordChannels;
        for_each_tile(unit, [&](int64_t begin, int count) {
            const uint8_t* pixels[kTilePixels];
            for (int p = 0; p < count; ++p) pixels[p] = unit.pixels[begin + p] + group * shape_.group_channels();
            alignas(32) int32_t sums[kTilePixels * kPanelOutputs];
            dot_(pixels, count, taps_, problem_.span, weights, sums);
            put(unit, begin, count, output, outputs, index * kPanelOutputs, sums);
        });
    }

    void depthwise_block(const Unit& unit, int64_t block) const {
        const int64_t first = first_channel(block), pairs = ceil_div(shape_.kernel.area(), 2);
        const int channels = static_cast<int>(std::min<int64_t>(kBlock, shape_.channels));
        const int8_t* weights = weights_.data() + block * pairs * 2 * kBlock;
        for_each_tile(unit, [&](int64_t begin, int count) {
            const uint8_t* pixels[kTilePixels];
            for (int p = 0; p < count; ++p) pixels[p] = unit.pixels[begin + p] + first;
            alignas(32) int32_t sums[2 * kTilePixels * kPanelOutputs];
            if (depthwise_dot_) {
                depthwise_dot_(pixels, count, offsets_.data(), pairs, problem_.span, weights, sums);
            } else {
                depthwise_tile(pixels, count, offsets_.data(), pairs, channels, weights, sums);
            }
            for (int c = 0; c < channels; c += kPanelOutputs)
                put(unit, begin, count, first + c, std::min(kPanelOutputs, channels - c), first + c,
                    sums + c * kTilePixels);
        });
    }

    // Finishes the sums of a tile: output channels from `output` on, whose parameters begin at `at`.
    void put(const Unit& unit, int64_t begin, int count, int64_t output, int outputs, int64_t at,
             int32_t* sums) const {
        if (problem_.zero_sums)
            for (int p = 0; p < count; ++p) subtract_zeros(unit.windows[begin + p], at, sums + p * kPanelOutputs);
        const int64_t stride = shape_.out_channels, to = (unit.first + begin) * stride + output;
        if (outputs == kPanelOutputs)
            return finish_(sums, count, stride, problem_.residual + (problem_.residual ? to : 0), y_ + to,
                           parameters(at), problem_.activation);
        // Less than a panel: by way of a full one.
        uint8_t residual[kTilePixels * kPanelOutputs] = {};
        T y[kTilePixels * kPanelOutputs];
        for (int p = 0; problem_.residual && p < count; ++p)
            std::memcpy(residual + p * kPanelOutputs, problem_.residual + to + p * stride, outputs);
        finish_(sums, count, kPanelOutputs, residual, y, parameters(at), problem_.activation);
        for (int p = 0; p < count; ++p)
            std::memcpy(static_cast<void*>(y_ + to + p * stride), y + p * kPanelOutputs, outputs * sizeof(T));
    }

    void subtract_zeros(const Window& w, int64_t at, int32_t* sums) const {
        const Extent kernel = shape_.kernel;
        if (w.bottom - w.top == kernel.height && w.right - w.left == kernel.width) {
            for (int o = 0; o < kPanelOutputs; ++o) sums[o] -= all_zeros_[at + o];
            return;
        }
        for (int64_t r = w.top; r < w.bottom; ++r)
            for (int64_t s = w.left; s < w.right; ++s) {
                const int32_t* zeros = zeros_.data() + (r * kernel.width + s) * padded_outputs() + at;
                for (int o = 0; o < kPanelOutputs; ++o) sums[o] -= zeros[o];
            }
    }

    const ConvProblem& problem_;
    const ConvShape& shape_;
    T* y_;
    bool depthwise_, direct_;
    int64_t row_bytes_;  // of the image or of a band
    std::vector<int64_t> offsets_;
    Taps taps_;
    std::vector<float> fields_;
    std::vector<int32_t> zeros_, all_zeros_;  // of each tap, and of all taps together
    std::vector<int8_t> weights_;             // of depthwise blocks
    Finisher<T> finish_;
    DotTile dot_ = dot_tile;
    DepthwiseTile depthwise_dot_ = nullptr;
};

struct Cpu {
    template <class T>
    static void conv(const Tensor&, const ConvProblem& problem, T* y) {
        Convolution<T>(problem, y).run();
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) { m.impl("conv2d_integer", TORCH_BOX(&ConvOps<Cpu>::conv2d_integer)); }

}  // namespace ptq4cuda
