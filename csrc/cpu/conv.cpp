// conv2d_integer on the CPU: integer sums tile by tile (conv_tiles.h), finished while they are in cache
// (conv_finish.h).
//
// The work is cut into units of neighbouring output pixels. A unit's input stays in the second-level cache while the
// panels of weights pass by, a few at a time, and these stay in the first-level cache while they meet all tiles of
// the unit. Nothing is unfolded: a tile reads each tap of its pixels where it lies. Where the image is padded, the
// rows that a unit needs are copied into a band with zeros around them; also where channels do not fill words, and
// where codes are split into nibbles.
#include <vector>

#include "conv_finish.h"

namespace ptq4cuda {
namespace {

constexpr int64_t kUnitBytes = 64 << 10;    // of input
constexpr int64_t kUnitPixels = 1024;       // at most
constexpr int64_t kMinimumUnitPixels = 24;  // less does not pay for reading all weights
constexpr int64_t kPanelBytes = 16 << 10;   // of weights that meet a tile before the next tile
constexpr int64_t kTaskProducts = 1 << 18;  // worth a thread
constexpr int64_t kTasksPerThread = 4;

template <class T>
class Convolution {
public:
    Convolution(const ConvProblem& problem, T* y)
        : problem_(problem),
          shape_(problem.shape),
          depthwise_(shape_.depthwise()),
          packed_(shape_.packed()),
          split_(problem.span < 0 && !packed_),  // packed codes are nibbles already
          span_(std::abs(problem.span)),
          out_{y, finisher<T>(problem)},
          also_{problem.also, finisher<uint8_t>(problem)} {
        const bool whole_words = depthwise_ || shape_.group_channels() % kWordChannels == 0;
        direct_ = whole_words && !split_ && !packed_ && shape_.padding.height + shape_.padding.width == 0;
        // In a band, channels are filled up to whole words where all are read together.
        const bool filled = !direct_ && shape_.groups == 1;
        pixel_bytes_ = filled ? shape_.words_per_tap() * kWordChannels : shape_.channels;
        row_bytes_ = (shape_.in.width + (direct_ ? 0 : 2 * shape_.padding.width)) * pixel_bytes_;
        find_taps();
        find_panels();
        if (problem.zero_sums) lay_out_zeros();
        out_.parameters = parameters(problem.out_quantizer);
        if (also_.y) also_.parameters = parameters(problem.also_quantizer);
#if defined(__x86_64__)
        if (simd::level() >= simd::Level::avx2) {
            dot_ = dot_tile_avx2;
            if (shape_.channels >= kBlock) depthwise_dot_ = depthwise_tile_avx2;
        }
#endif
    }

    void run() const {
        const Extent out = shape_.out;
        int64_t pixels = kUnitBytes / (pixel_bytes_ * shape_.stride.area());
        pixels = std::clamp(pixels, kMinimumUnitPixels, kUnitPixels);
        const int64_t bands = ceil_div(out.height, std::clamp<int64_t>(pixels / out.width, 1, out.height));
        const int64_t rows = ceil_div(out.height, bands);
        if (!direct_) pixels = rows * out.width;
        const int64_t units = direct_ ? ceil_div(shape_.pixels(), pixels) : shape_.batch * ceil_div(out.height, rows);

        // Where units are few, their output channels are shared out, too.
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
                compute(unit, blocks() * part / parts, blocks() * (part + 1) / parts);
            }
        });
    }

private:
    // --- what all units share

    // Output channels of which 16 are finished together; a depthwise block has two panels.
    struct Panel {
        int64_t output;   // the first
        int64_t outputs;  // how many there are
        int64_t channel;  // the first input channel
    };

    template <class U>
    struct Output {
        U* y;
        Finisher<U> finish;
        std::vector<float> parameters = {};  // [panels][fields][16]
    };

    int64_t blocks() const { return static_cast<int64_t>(panels_.size()) / (depthwise_ ? 2 : 1); }

    void find_taps() {
        const Extent k = shape_.kernel, d = shape_.dilation;
        // The taps of a row follow each other in memory, as their weights do.
        const bool joined = shape_.groups == 1 && d.width == 1 && !packed_;
        for (int64_t r = 0; r < k.height; ++r)
            for (int64_t s = 0; s < (joined ? 1 : k.width); ++s)
                offsets_.push_back(r * d.height * row_bytes_ + s * d.width * pixel_bytes_);
        const auto taps = [&](int64_t words) {
            return Taps{offsets_.data(), static_cast<int64_t>(offsets_.size()), words};
        };
        taps_ =
            taps(packed_ ? shape_.low_bytes * 2 / kWordChannels : shape_.words_per_tap() * (joined ? k.width : 1));
        high_taps_ = taps(packed_ ? shape_.high_bytes() * 2 / kWordChannels : taps_.words);
        if (!depthwise_) return;
        if (offsets_.size() % 2) offsets_.push_back(0);  // with weights that are zero
        tap_pairs_ = {offsets_.data(), static_cast<int64_t>(offsets_.size()) / 2};
    }

    void find_panels() {
        if (!depthwise_) {
            for (int64_t g = 0; g < shape_.groups; ++g)
                for (int64_t o = 0; o < shape_.group_outputs(); o += kPanelOutputs)
                    panels_.push_back({g * shape_.group_outputs() + o,
                                       std::min<int64_t>(kPanelOutputs, shape_.group_outputs() - o),
                                       g * shape_.group_channels()});
            return;
        }
        const int64_t channels = shape_.channels, pairs = tap_pairs_.count;
        weights_.assign(ceil_div(channels, kBlock) * pairs * 2 * kBlock, 0);
        for (int64_t b = 0; b < channels; b += kBlock) {
            // The last block begins early enough to be full, and does some channels again.
            const int64_t first = std::max<int64_t>(0, std::min(b, channels - kBlock));
            const int64_t count = std::min<int64_t>(kBlock, channels - first);
            for (int64_t i = 0; i < kBlock; i += kPanelOutputs)
                panels_.push_back({first + i, std::clamp<int64_t>(count - i, 0, kPanelOutputs), first});
            for (int64_t t = 0; t < shape_.kernel.area(); ++t)
                std::memcpy(&weights_[b * 2 * pairs + t * kBlock], problem_.weight + t * channels + first, count);
        }
    }

    std::vector<float> parameters(const QuantizerTable& quantizer) const {
        std::vector<float> laid_out(panels_.size() * kFields * kPanelOutputs);
        for (size_t i = 0; i < panels_.size(); ++i)
            for (int64_t j = 0; j < panels_[i].outputs; ++j) {
                const auto values = parameters_of(problem_, quantizer, panels_[i].output + j);
                for (int f = 0; f < kFields; ++f) laid_out[(i * kFields + f) * kPanelOutputs + j] = values[f];
            }
        return laid_out;
    }

    void lay_out_zeros() {
        const int64_t area = shape_.kernel.area();
        zeros_.assign(panels_.size() * (area + 1) * kPanelOutputs, 0);
        for (size_t i = 0; i < panels_.size(); ++i)
            for (int64_t j = 0; j < panels_[i].outputs; ++j) {
                int32_t* zeros = &zeros_[i * (area + 1) * kPanelOutputs + j];
                for (int64_t t = 0; t < area; ++t) {
                    zeros[t * kPanelOutputs] = problem_.zero_sums[t * shape_.out_channels + panels_[i].output + j];
                    zeros[area * kPanelOutputs] += zeros[t * kPanelOutputs];
                }
            }
    }

    // --- the input of a unit

    // Taps of a pixel that are inside of the image: [top, bottom) x [left, right).
    struct Window {
        int64_t top, bottom, left, right;
    };
    struct Unit {
        int64_t first = 0;                   // output pixel; the others follow
        std::vector<const uint8_t*> pixels;  // where each of them reads its first tap
        std::vector<Window> windows;         // of each of them, if zero points have a share
        std::vector<uint8_t> band;
        int64_t plane = 0;  // bytes from the high nibbles to the low ones
    };

    void take_pixels(int64_t first, int64_t count, Unit& unit) const {
        const Extent in = shape_.in, out = shape_.out, stride = shape_.stride, kernel = shape_.kernel;
        unit.first = first;
        unit.pixels.clear();
        for (int64_t i = first; i < std::min(first + count, shape_.pixels()); ++i) {
            const int64_t row = i / out.width % out.height * stride.height, column = i % out.width * stride.width;
            const int64_t n = i / out.area();
            unit.pixels.push_back(problem_.x + (n * in.height + row) * row_bytes_ + column * pixel_bytes_);
        }
        if (problem_.zero_sums) unit.windows.assign(unit.pixels.size(), {0, kernel.height, 0, kernel.width});
    }

    void take_band(int64_t u, int64_t rows, Unit& unit) const {
        const Extent in = shape_.in, out = shape_.out, stride = shape_.stride, pad = shape_.padding;
        const int64_t bands = ceil_div(out.height, rows), n = u / bands, top = u % bands * rows;
        const int64_t bottom = std::min(top + rows, out.height);
        const int64_t height =
            (bottom - top - 1) * stride.height + shape_.dilation.height * (shape_.kernel.height - 1) + 1;
        unit.plane = height * row_bytes_ + kWordChannels;  // the last word may reach beyond the last channel
        unit.band.assign((split_ ? 2 : 1) * unit.plane, 0);
        for (int64_t i = 0; i < height; ++i) {
            const int64_t row = top * stride.height - pad.height + i;
            if (row < 0 || row >= in.height) continue;
            copy_row(problem_.x + (n * in.height + row) * in.width * shape_.pixel_bytes(),
                     unit.band.data() + i * row_bytes_ + pad.width * pixel_bytes_, unit.plane);
        }
        unit.first = (n * out.height + top) * out.width;
        unit.pixels.clear();
        unit.windows.clear();
        for (int64_t r = 0; r < bottom - top; ++r)
            for (int64_t c = 0; c < out.width; ++c) {
                unit.pixels.push_back(unit.band.data() + r * stride.height * row_bytes_ +
                                      c * stride.width * pixel_bytes_);
                if (problem_.zero_sums) unit.windows.push_back(window((top + r) * stride.height, c * stride.width));
            }
    }

    // Copies a row of the image, or its high nibbles and, a plane further, its low ones. Of a word of packed codes
    // the even nibbles are followed by the odd ones, as in the panels.
    void copy_row(const uint8_t* from, uint8_t* to, int64_t plane) const {
        const int64_t channels = shape_.channels, width = shape_.in.width, n = channels * width;
        if (packed_) {
            for (int64_t i = 0; i < n; i += 2 * kWordChannels, from += kWordChannels, to += 2 * kWordChannels) {
                uint32_t word;
                std::memcpy(&word, from, sizeof word);
                const uint32_t halves[2] = {word & 0x0f0f0f0f, word >> 4 & 0x0f0f0f0f};
                std::memcpy(to, halves, sizeof halves);
            }
        } else if (pixel_bytes_ != channels) {
            for (int64_t i = 0; i < n; i += channels)
                for (int64_t c = 0; c < channels; c += kWordChannels, to += kWordChannels)
                    copy_word(from + i + c, std::min<int64_t>(kWordChannels, channels - c), to, plane);
        } else if (split_) {
            for (int64_t i = 0; i < n; ++i) to[i] = high_nibble(from[i]);
            for (int64_t i = 0; i < n; ++i) to[plane + i] = low_nibble(from[i]);
        } else {
            std::memcpy(to, from, n);
        }
    }
    PTQ_INLINE void copy_word(const uint8_t* from, int64_t channels, uint8_t* to, int64_t plane) const {
        uint32_t word = from[0];
        if (channels > 1) word |= uint32_t{from[1]} << 8;
        if (channels > 2) word |= uint32_t{from[2]} << 16;
        if (channels > 3) word |= uint32_t{from[3]} << 24;
        const uint32_t high = word >> 4 & 0x0f0f0f0f, low = word & 0x0f0f0f0f;
        std::memcpy(to, split_ ? &high : &word, sizeof word);
        if (split_) std::memcpy(to + plane, &low, sizeof low);
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

    // --- the outputs of a unit

    // Blocks begin to end for all pixels of a unit, in tiles of nearly equal size. A few blocks are taken together:
    // their weights stay in cache, and a tile's outputs share lines of memory.
    void compute(const Unit& unit, int64_t begin, int64_t end) const {
        const int64_t count = unit.pixels.size(), tiles = ceil_div(count, kTilePixels);
        const int64_t bytes = shape_.panel_words() * kPanelOutputs * kWordChannels;
        const int64_t together = std::max<int64_t>(1, kPanelBytes / bytes);
        for (int64_t first = begin; first < end; first += together)
            for (int64_t t = 0, pixel = 0; t < tiles; ++t) {
                const int pixels = static_cast<int>((count - pixel) / (tiles - t));
                for (int64_t b = first; b < std::min(first + together, end); ++b)
                    depthwise_ ? depthwise_block(unit, pixel, pixels, b) : panel(unit, pixel, pixels, b);
                pixel += pixels;
            }
    }

    // In vectors; what the compiler takes for so few bytes is slow to start.
    template <size_t N>
    static void clear(int32_t (&sums)[N]) {
        using Four = int32_t __attribute__((vector_size(16)));
        const Four zero = {};
#pragma GCC unroll 48
        for (size_t i = 0; i < N; i += 4) std::memcpy(sums + i, &zero, sizeof zero);
    }

    void panel(const Unit& unit, int64_t begin, int count, int64_t b) const {
        const uint8_t* const* pixels = &unit.pixels[begin];
        const int8_t* weights = problem_.weight + b * shape_.panel_words() * kPanelOutputs * kWordChannels;
        alignas(32) int32_t sums[kTilePixels * kPanelOutputs];
        clear(sums);
        const auto add = [&](int64_t from, const Taps& taps, int64_t word) {
            dot_(pixels, count, panels_[b].channel + from, taps, span_,
                 weights + word * kPanelOutputs * kWordChannels, sums);
        };
        if (split_ || packed_) {  // high nibbles first
            add(packed_ ? 2 * shape_.low_bytes : 0, high_taps_, 0);
            for (int32_t& sum : sums) sum *= 16;
        }
        add(split_ ? unit.plane : 0, taps_, packed_ ? high_taps_.count * high_taps_.words : 0);
        put(unit, begin, count, b, sums);
    }

    void depthwise_block(const Unit& unit, int64_t begin, int count, int64_t b) const {
        const uint8_t* const* pixels = &unit.pixels[begin];
        const int64_t channel = panels_[2 * b].channel, channels = std::min<int64_t>(kBlock, shape_.channels);
        const int8_t* weights = &weights_[b * tap_pairs_.count * 2 * kBlock];
        alignas(32) int32_t sums[2 * kTilePixels * kPanelOutputs];
        clear(sums);
        depthwise_dot_(pixels, count, channel, tap_pairs_, span_, weights, channels, sums);
        if (split_) {
            for (int32_t& sum : sums) sum *= 16;
            depthwise_dot_(pixels, count, channel + unit.plane, tap_pairs_, span_, weights, channels, sums);
        }
        put(unit, begin, count, 2 * b, sums);
        put(unit, begin, count, 2 * b + 1, sums + kTilePixels * kPanelOutputs);
    }

    // Finishes the sums of a tile and one panel: a second output begins with the sums once more, which are at hand.
    void put(const Unit& unit, int64_t begin, int count, int64_t index, int32_t* sums) const {
        const Panel& panel = panels_[index];
        if (panel.outputs == 0) return;
        if (problem_.zero_sums)
            for (int p = 0; p < count; ++p) subtract_zeros(unit.windows[begin + p], index, sums + p * kPanelOutputs);
        put(out_, unit.first + begin, count, index, sums);
        if (also_.y) put(also_, unit.first + begin, count, index, sums);
    }
    template <class U>
    void put(const Output<U>& output, int64_t pixel, int count, int64_t index, const int32_t* sums) const {
        const Panel& panel = panels_[index];
        const int64_t stride = shape_.out_channels, to = pixel * stride + panel.output;
        const uint8_t* residual = problem_.residual ? problem_.residual + to : nullptr;
        const float* parameters = &output.parameters[index * kFields * kPanelOutputs];
        if (panel.outputs == kPanelOutputs)
            return output.finish(sums, count, stride, residual, output.y + to, parameters, problem_.activation);
        // Less than a panel: by way of a full one.
        uint8_t residuals[kTilePixels * kPanelOutputs] = {};
        U y[kTilePixels * kPanelOutputs];
        for (int p = 0; residual && p < count; ++p)
            std::memcpy(residuals + p * kPanelOutputs, residual + p * stride, panel.outputs);
        output.finish(sums, count, kPanelOutputs, residuals, y, parameters, problem_.activation);
        for (int p = 0; p < count; ++p)
            std::memcpy(static_cast<void*>(output.y + to + p * stride), y + p * kPanelOutputs,
                        panel.outputs * sizeof(U));
    }

    void subtract_zeros(const Window& w, int64_t index, int32_t* sums) const {
        const Extent kernel = shape_.kernel;
        const int32_t* of_taps = &zeros_[index * (kernel.area() + 1) * kPanelOutputs];
        const auto subtract = [&](int64_t tap) {
            for (int o = 0; o < kPanelOutputs; ++o) sums[o] -= of_taps[tap * kPanelOutputs + o];
        };
        if (w.bottom - w.top == kernel.height && w.right - w.left == kernel.width) return subtract(kernel.area());
        for (int64_t r = w.top; r < w.bottom; ++r)
            for (int64_t s = w.left; s < w.right; ++s) subtract(r * kernel.width + s);
    }

    const ConvProblem& problem_;
    const ConvShape& shape_;
    bool depthwise_, packed_, split_, direct_;
    int64_t span_, pixel_bytes_, row_bytes_;  // of the image or of a band
    std::vector<int64_t> offsets_;            // of the taps from a pixel's address
    Taps taps_{}, high_taps_{};
    TapPairs tap_pairs_{};
    std::vector<Panel> panels_;
    std::vector<int32_t> zeros_;   // [panels][taps, then all taps together][16]
    std::vector<int8_t> weights_;  // of depthwise blocks
    Output<T> out_;
    Output<uint8_t> also_;
    DotTile dot_ = dot_tile;
    DepthwiseTile depthwise_dot_ = depthwise_tile;
};

// Packs codes of all pixels: nibble after nibble, each octet's into two words.
void pack(const std::vector<uint8_t>& codes, const QuantizerTable& quantizer, const Packing& packing, int64_t pixels,
          uint8_t* to) {
    const int64_t channels = codes.size() / pixels, octets = ceil_div(channels, kOctet);
    std::vector<bool> is_high(channels);
    for (int64_t c = 0; c < channels; ++c) is_high[c] = quantizer[c].qmax > 15.0f;
    torch::stable::parallel_for(0, pixels, kTaskProducts / channels + 1, [&](int64_t p, int64_t end_pixel) {
        for (; p < end_pixel; ++p)
            for (int64_t k = 0; k < octets; ++k) {
                uint32_t low = 0, high = 0;
                int bits = 0;  // of the high nibbles
                for (int64_t c = k * kOctet; c < std::min(channels, (k + 1) * kOctet); ++c) {
                    const uint32_t code = codes[p * channels + c];
                    low |= (code & 15) << (c % kOctet * 4);
                    if (!is_high[c]) continue;
                    high |= code >> 4 << bits;
                    bits += 4;
                }
                uint8_t* pixel = to + p * packing.bytes;
                std::memcpy(pixel + k * sizeof low, &low, sizeof low);
                const int32_t begin = packing.begin(k), end = packing.end(k);
                for (int32_t b = begin; b < end; ++b)
                    pixel[b] = b - begin < 4 ? static_cast<uint8_t>(high >> (8 * (b - begin))) : 0;
            }
    });
}

struct Cpu {
    // Outputs that are packed are computed in bytes first.
    template <class T>
    static void conv(const Tensor&, const ConvProblem& given, T* y) {
        ConvProblem problem = given;
        const int64_t pixels = problem.shape.pixels(), size = pixels * problem.shape.out_channels;
        std::vector<uint8_t> out(given.out_packing.starts ? size : 0), also(given.also_packing.starts ? size : 0);
        if (!also.empty()) problem.also = also.data();
        if constexpr (std::is_same_v<T, uint8_t>) {
            Convolution<T>(problem, out.empty() ? y : out.data()).run();
            if (!out.empty()) pack(out, given.out_quantizer, given.out_packing, pixels, y);
        } else {
            Convolution<T>(problem, y).run();
        }
        if (!also.empty()) pack(also, given.also_quantizer, given.also_packing, pixels, given.also);
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) { m.impl("conv2d_integer", TORCH_BOX(&ConvOps<Cpu>::conv2d_integer)); }

}  // namespace ptq4cuda
