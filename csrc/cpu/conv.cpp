// conv2d_integer on the CPU: integer sums tile by tile (conv_tiles.h), finished while they are in cache
// (conv_finish.h).
//
// The work is cut into units of neighbouring output pixels. A unit's input stays in the second-level cache while the
// panels of weights pass by, a few at a time, and these stay in the first-level cache while they meet all tiles of
// the unit. Nothing is unfolded: a tile reads each tap of its pixels where it lies. Where the image is padded, the
// rows that a unit needs are copied into a band with zeros around them; also where channels do not fill words, and
// where codes are split into nibbles or widened to 16 bits.
#include <atomic>
#include <vector>

#include "conv_finish.h"

namespace ptq4cuda {
namespace {

constexpr int64_t kUnitBytes = 64 << 10;    // of input
constexpr int64_t kUnitPixels = 1024;       // at most
constexpr int64_t kMinimumUnitPixels = 24;  // less does not pay for reading all weights
constexpr int64_t kBandBytes = 64 << 20;    // of more than one row of outputs, at most
constexpr int64_t kPanelBytes = 16 << 10;   // of weights that meet a tile before the next tile
constexpr int64_t kTaskProducts = 1 << 18;  // worth a thread
constexpr int64_t kTasksPerThread = 4;

template <class T>
class Convolution {
public:
    Convolution(const ConvProblem& problem, T* y)
        : problem_(problem),
          shape_(problem.shape),
          tiles_(tiles()),
          depthwise_(shape_.depthwise()),
          packed_(shape_.packed()),
          dense_(shape_.groups == 1 && shape_.channels < kWordChannels && shape_.dilation.width == 1 &&
                 (problem.span < 0 || !tiles_.narrow_sums)),
          split_(problem.span < 0 && tiles_.narrow_sums && !dense_ && !depthwise_ &&
                 !packed_),  // packed codes are nibbles already
          span_(std::abs(problem.span)),
          y_(y),
          finish_(finisher_of<T>(problem)) {
        const bool whole_words = depthwise_ || shape_.group_channels() % kWordChannels == 0;
        direct_ = whole_words && !split_ && !packed_ && shape_.padding.height + shape_.padding.width == 0;
        // In a band, channels are filled up to whole words where all are read together.
        const bool filled = !direct_ && shape_.groups == 1;
        pixel_bytes_ = dense_   ? shape_.channels * code_bytes()
                       : filled ? shape_.words_per_tap() * kWordChannels
                                : shape_.channels;
        row_bytes_ = (shape_.in.width + (direct_ ? 0 : 2 * shape_.padding.width)) * pixel_bytes_;
        find_taps();
        find_panels();
        lay_out_weights();
        if (problem.zero_sums && shape_.padding.height + shape_.padding.width > 0) lay_out_zeros();
        parameters_ = parameters(problem.out_quantizer);
        if (problem.also) also_parameters_ = parameters(problem.also_quantizer);
    }

    void run() const {
        const Extent out = shape_.out;
        int64_t pixels = kUnitBytes / pixel_bytes_ / shape_.stride.height / shape_.stride.width;
        pixels = std::clamp(pixels, kMinimumUnitPixels, kUnitPixels);
        // However far apart rows of outputs are, their band must not outgrow memory.
        const int64_t most = std::max<int64_t>(kBandBytes / row_bytes_ / shape_.stride.height, 1);
        const int64_t bands =
            ceil_div(out.height, std::clamp<int64_t>(std::min(pixels / out.width, most), 1, out.height));
        const int64_t rows = ceil_div(out.height, bands);
        if (!direct_) pixels = rows * out.width;
        const int64_t units = direct_ ? ceil_div(shape_.pixels(), pixels) : shape_.batch * ceil_div(out.height, rows);

        // Where units are few, their output channels are shared out, too.
        const int64_t wanted = torch::stable::get_num_threads() * kTasksPerThread;
        const int64_t parts = std::clamp<int64_t>(ceil_div(wanted, units), 1, blocks());
        const double products = static_cast<double>(pixels) * static_cast<double>(shape_.out_channels) / parts *
                                static_cast<double>(shape_.kernel.area() * shape_.group_channels());
        // Threads take the next task when they are done with one: some are late, and processors are shared.
        const int64_t tasks = units * parts;
        std::atomic<int64_t> next = 0;
        const int64_t grain = static_cast<int64_t>(kTaskProducts / products) + 1;
        torch::stable::parallel_for(0, tasks, grain, [&](int64_t, int64_t) {
            Unit unit;
            int64_t held = -1;
            for (int64_t task; (task = next++) < tasks;) {
                const int64_t u = task / parts, part = task % parts;
                if (u != held) direct_ ? take_pixels(u * pixels, pixels, unit) : take_band(u, rows, unit);
                held = u;
                compute(unit, blocks() * part / parts, blocks() * (part + 1) / parts);
            }
        });
    }

private:
    // --- what all units share

    // Output channels of which 16 are finished together.
    struct Panel {
        int64_t output;   // the first
        int64_t outputs;  // how many there are
        int64_t channel;  // the first input channel
    };

    static const Tiles& tiles() {
#if defined(__x86_64__)
        if (simd::level() >= simd::Level::avx512_vnni) return kTilesVnni;
        if (simd::level() >= simd::Level::avx2) return kTilesAvx2;
#endif
        return kTiles;
    }

    int64_t code_bytes() const { return dense_ ? kWordChannels / tiles_.dense_codes : 1; }
    int block_panels() const { return depthwise_ ? tiles_.depthwise_panels : 1; }
    int64_t blocks() const { return static_cast<int64_t>(panels_.size()) / block_panels(); }
    int64_t panel_bytes() const {
        return (dense_ ? taps_.count * taps_.words : shape_.panel_words()) * kPanelOutputs * kWordChannels;
    }

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
        taps_ = taps(dense_    ? ceil_div(k.width * pixel_bytes_, kWordChannels)
                     : packed_ ? shape_.low_bytes * 2 / kWordChannels
                               : shape_.words_per_tap() * (joined ? k.width : 1));
        high_taps_ = taps(packed_ ? shape_.high_bytes() * 2 / kWordChannels : taps_.words);
        if (depthwise_) group_taps();
    }

    // Row by row, or three rows of a column and a tap that is missing.
    void group_taps() {
        const Extent k = shape_.kernel;
        const bool columns = k.height == 3 && tiles_.depthwise_taps == 4;
        const size_t taps = tiles_.depthwise_taps;
        for (int64_t i = 0; i < k.area(); ++i) {
            if (columns && i > 0 && i % 3 == 0) grouped_.push_back(-1);
            grouped_.push_back(columns ? i % 3 * k.width + i / 3 : i);
        }
        while (grouped_.size() % taps) grouped_.push_back(-1);
        std::vector<int64_t> offsets;
        for (int64_t tap : grouped_) offsets.push_back(tap < 0 ? 0 : offsets_[tap]);  // its weights are zero
        offsets_ = std::move(offsets);
        tap_groups_ = {offsets_.data(), static_cast<int64_t>(grouped_.size() / taps), columns};
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
        const int64_t channels = shape_.channels, block = block_panels() * kPanelOutputs;
        for (int64_t b = 0; b < channels; b += block) {
            // The last block may begin early enough to be full, and do some channels again.
            const int64_t first = tiles_.whole_blocks ? std::max<int64_t>(0, std::min(b, channels - block)) : b;
            const int64_t count = std::min(block, channels - first);
            for (int64_t i = 0; i < block; i += kPanelOutputs)
                panels_.push_back({first + i, std::clamp<int64_t>(count - i, 0, kPanelOutputs), first});
        }
    }

    // As the tiles want them, where these are not the panels: of depthwise layers, and of dense ones, from single
    // pixels to rows without gaps.
    void lay_out_weights() {
        weights_ = {problem_.weight, panel_bytes(), 0};
        if (!depthwise_ && !dense_) return;
        if (depthwise_) weights_.bytes = tap_groups_.count * block_panels() * kPanelOutputs * kWordChannels;
        own_weights_.assign(blocks() * weights_.bytes, 0);
        weights_.weights = own_weights_.data();
        const int in_word = depthwise_ ? tiles_.depthwise_taps : tiles_.dense_codes;
        in_word == kWordChannels ? lay_out_weights<int8_t>() : lay_out_weights<int16_t>();
    }

    template <class Weight>
    void lay_out_weights() {
        constexpr int64_t kInWord = kWordChannels / sizeof(Weight);
        for (int64_t b = 0; b < blocks(); ++b) {
            Weight* to = reinterpret_cast<Weight*>(&own_weights_[b * weights_.bytes]);
            depthwise_ ? lay_out_block<kInWord>(b, to) : lay_out_dense_panel<kInWord>(b, to);
        }
    }

    template <int64_t kInWord, class Weight>
    void lay_out_block(int64_t b, Weight* to) const {
        const int64_t first = panels_[b * block_panels()].channel, taps = grouped_.size();
        const int64_t channels = block_panels() * kPanelOutputs;
        for (int64_t c = 0; c < std::min(channels, shape_.channels - first); ++c) {
            const int8_t* from = problem_.weight + first + c;
            Weight* words = to + place_in_block(c, block_panels()) * kInWord;
            for (int64_t t = 0; t < taps; ++t)
                if (grouped_[t] >= 0)
                    words[t / kInWord * channels * kInWord + t % kInWord] = from[grouped_[t] * shape_.channels];
        }
    }

    template <int64_t kInWord, class Weight>
    void lay_out_dense_panel(int64_t b, Weight* to) const {
        const Extent kernel = shape_.kernel;
        const int8_t* from = problem_.weight + b * kernel.area() * kPanelOutputs * kWordChannels;
        for (int64_t r = 0; r < kernel.height; ++r, to += taps_.words * kPanelOutputs * kInWord)
            for (int64_t s = 0; s < kernel.width; ++s)
                for (int64_t o = 0; o < kPanelOutputs; ++o, from += kWordChannels)
                    for (int64_t c = 0; c < shape_.channels; ++c) {
                        const int64_t at = s * shape_.channels + c;
                        to[(at / kInWord * kPanelOutputs + o) * kInWord + at % kInWord] = from[c];
                    }
    }

    simd::Vector<float> parameters(const QuantizerTable& quantizer) const {
        simd::Vector<float> laid_out(panels_.size() * kPanelParameters);
        for (size_t i = 0; i < panels_.size(); ++i)
            for (int64_t j = 0; j < panels_[i].outputs; ++j) {
                const auto values = parameters_of(problem_, quantizer, panels_[i].output + j);
                for (int f = 0; f < kFields; ++f) laid_out[(i * kFields + f) * kPanelOutputs + j] = values[f];
            }
        return laid_out;
    }

    void lay_out_zeros() {
        const int64_t area = shape_.kernel.area();
        zeros_.assign(panels_.size() * area * kPanelOutputs, 0);
        for (size_t i = 0; i < panels_.size(); ++i)
            for (int64_t t = 0; t < area; ++t)
                std::memcpy(&zeros_[(i * area + t) * kPanelOutputs],
                            problem_.zero_sums + t * shape_.out_channels + panels_[i].output,
                            panels_[i].outputs * sizeof(int32_t));
        for (int64_t c = 0; c < shape_.out.width; ++c) columns_.push_back(inside_columns(c));
    }

    // --- the input of a unit

    // Taps of a pixel that are inside of the image: [top, bottom) x [left, right).
    struct Window {
        int64_t top, bottom, left, right;
    };
    struct Unit {
        int64_t first = 0;                   // output pixel; the others follow
        std::vector<const uint8_t*> pixels;  // where each of them reads its first tap
        std::vector<Window> windows;         // of each of them, if zero points have a share that padding changes
        simd::Vector<uint8_t> band;
        int64_t plane = 0;  // bytes from the high nibbles to the low ones
    };

    void take_pixels(int64_t first, int64_t count, Unit& unit) const {
        const Extent in = shape_.in, out = shape_.out, stride = shape_.stride;
        unit.first = first;
        unit.pixels.clear();
        int64_t n = first / out.area(), row = first / out.width % out.height, column = first % out.width;
        for (int64_t i = first; i < std::min(first + count, shape_.pixels()); ++i) {
            unit.pixels.push_back(problem_.x + (n * in.height + row * stride.height) * row_bytes_ +
                                  column * stride.width * pixel_bytes_);
            if (++column < out.width) continue;
            column = 0;
            if (++row < out.height) continue;
            row = 0;
            ++n;
        }
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
        for (int64_t r = 0; r < bottom - top; ++r) {
            const uint8_t* row = unit.band.data() + r * stride.height * row_bytes_;
            for (int64_t c = 0; c < out.width; ++c) unit.pixels.push_back(row + c * stride.width * pixel_bytes_);
            if (zeros_.empty()) continue;
            const auto [first, end] = inside_rows(top + r);
            for (const auto& [left, right] : columns_) unit.windows.push_back({first, end, left, right});
        }
    }

    // Copies a row of the image, as it is, or widened, or its high nibbles and, a plane further, its low ones. Of a
    // word of packed codes the even nibbles are followed by the odd ones, as in the panels.
    void copy_row(const uint8_t* from, uint8_t* to, int64_t plane) const {
        const int64_t channels = shape_.channels, width = shape_.in.width, n = channels * width;
        if (packed_) {
            for (int64_t i = 0; i < n; i += 2 * kWordChannels, from += kWordChannels, to += 2 * kWordChannels) {
                uint32_t word;
                std::memcpy(&word, from, sizeof word);
                const uint32_t halves[2] = {word & 0x0f0f0f0f, word >> 4 & 0x0f0f0f0f};
                std::memcpy(to, halves, sizeof halves);
            }
        } else if (code_bytes() == sizeof(uint16_t)) {
            for (int64_t i = 0; i < n; ++i) {
                const uint16_t code = from[i];
                std::memcpy(to + i * sizeof code, &code, sizeof code);
            }
        } else if (!dense_ && pixel_bytes_ != channels) {
            for (int64_t i = 0; i < n; i += channels)
                for (int64_t c = 0; c < channels; c += kWordChannels, to += kWordChannels)
                    copy_word(from + i + c, std::min<int64_t>(kWordChannels, channels - c), to, plane);
        } else if (split_) {
            for (int64_t i = 0; i < n; ++i) to[i] = high_nibble(from[i]);
            for (int64_t i = 0; i < n; ++i) to[plane + i] = low_nibble(from[i]);
        } else if (n > 0) {
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

    // Which of `count` taps, the first of them at `first` in the padded image, are inside of an image of this size.
    static std::pair<int64_t, int64_t> inside(int64_t first, int64_t pad, int64_t size, int64_t step, int64_t count) {
        const int64_t before = std::clamp<int64_t>(ceil_div(pad - first, step), 0, count);
        const int64_t end = std::clamp<int64_t>(ceil_div(pad + size - first, step), before, count);
        return {before, end};
    }
    std::pair<int64_t, int64_t> inside_rows(int64_t row) const {
        return inside(row * shape_.stride.height, shape_.padding.height, shape_.in.height, shape_.dilation.height,
                      shape_.kernel.height);
    }
    std::pair<int64_t, int64_t> inside_columns(int64_t column) const {
        return inside(column * shape_.stride.width, shape_.padding.width, shape_.in.width, shape_.dilation.width,
                      shape_.kernel.width);
    }

    // --- the outputs of a unit

    // Blocks begin to end for all pixels of a unit, in tiles of nearly equal size. A few blocks are taken together:
    // their weights stay in cache, and a tile's outputs share lines of memory.
    void compute(const Unit& unit, int64_t begin, int64_t end) const {
        const int64_t count = unit.pixels.size(), tiles = ceil_div(count, kTilePixels);
        const int64_t most = depthwise_ ? 1 : tiles_.panels;
        const int64_t together = std::max(most, kPanelBytes / weights_.bytes / most * most);
        for (int64_t first = begin; first < end; first += together)
            for (int64_t t = 0, pixel = 0; t < tiles; ++t) {
                const int pixels = static_cast<int>((count - pixel) / (tiles - t));
                const int64_t last = std::min(first + together, end);
                prefetch_outputs(unit.first + pixel + pixels, std::min<int64_t>(kTilePixels, count - pixel - pixels),
                                 first * block_panels(), last * block_panels());
                for (int64_t b = first, n; b < last; b += n) {
                    // Blocks of a tile read the same channels.
                    for (n = 1; n < std::min(most, last - b) && panels_[b + n].channel == panels_[b].channel;) ++n;
                    tile(unit, pixel, pixels, b, n);
                }
                pixel += pixels;
            }
    }

    // The outputs of the next tile, and its residual: their lines lie too far apart to be foreseen.
    void prefetch_outputs(int64_t pixel, int64_t count, int64_t first, int64_t last) const {
        const int64_t begin = panels_[first].output, end = panels_[last - 1].output + panels_[last - 1].outputs;
        for (int64_t p = pixel; p < pixel + count; ++p) {
            const auto ask = [&](const auto* row) {
                row += p * shape_.out_channels;
                const char* from = reinterpret_cast<const char*>(row + begin);
                for (const char* stop = reinterpret_cast<const char*>(row + end); from < stop; from += simd::kLine)
                    __builtin_prefetch(from, 1);
            };
            ask(y_);
            if (problem_.residual) ask(problem_.residual);
            if (problem_.also) ask(problem_.also);
        }
    }

    // Some pixels and blocks: sums, then outputs.
    void tile(const Unit& unit, int64_t begin, int count, int64_t b, int64_t n) const {
        const uint8_t* const* pixels = &unit.pixels[begin];
        const int64_t index = b * block_panels(), channel = panels_[index].channel;
        const int8_t* weights = weights_.weights + b * weights_.bytes;
        alignas(64) int32_t sums[kTilePanels * kPanelSums];
        if (depthwise_) {
            const int64_t block = block_panels() * kPanelOutputs;
            tiles_.depthwise(pixels, count, channel, tap_groups_, weights, std::min(block, shape_.channels - channel),
                             sums);
            return put(unit, begin, count, index, block_panels(), sums);
        }
        const auto dot = [&](DotTile f, int64_t from, const Taps& taps, int64_t word, int32_t* to) {
            const int8_t* first = weights + word * kPanelOutputs * kWordChannels;
            f(pixels, count, channel + from, taps, span_, {first, weights_.bytes, static_cast<int>(n)}, to);
        };
        dot(dense_ ? tiles_.dense : tiles_.dot, split_ ? unit.plane : 0, taps_,
            packed_ ? high_taps_.count * high_taps_.words : 0, sums);
        if (split_ || (packed_ && high_taps_.words > 0)) {
            alignas(64) int32_t high[kTilePanels * kPanelSums];
            dot(tiles_.dot, packed_ ? 2 * shape_.low_bytes : 0, high_taps_, 0, high);
            for (int64_t i = 0; i < n; ++i)
                for (int j = 0; j < count * kPanelOutputs; ++j)
                    sums[i * kPanelSums + j] += high[i * kPanelSums + j] * 16;
        }
        put(unit, begin, count, index, n, sums);
    }

    // Finishes the sums of a tile: panels that follow each other.
    void put(const Unit& unit, int64_t begin, int count, int64_t index, int64_t n, int32_t* sums) const {
        if (!zeros_.empty())
            for (int64_t i = 0; i < n; ++i)
                for (int p = 0; p < count; ++p)
                    give_back_zeros(unit.windows[begin + p], index + i, sums + i * kPanelSums + p * kPanelOutputs);
        int64_t full = 0;
        while (full < n && panels_[index + full].outputs == kPanelOutputs) ++full;
        const int64_t stride = shape_.out_channels, to = (unit.first + begin) * stride + panels_[index].output;
        const int64_t parameters = index * kPanelParameters;
        const Finishing<T> f = {count,
                                full,
                                stride,
                                problem_.residual ? problem_.residual + to : nullptr,
                                y_ + to,
                                &parameters_[parameters],
                                problem_.also ? problem_.also + to : nullptr,
                                problem_.also ? &also_parameters_[parameters] : nullptr,
                                problem_.activation};
        if (full > 0) finish_(sums, f);
        if (full < n && panels_[index + full].outputs > 0) put_part(f, panels_[index + full].outputs, sums);
    }

    // Less than a panel, after the full ones: by way of a full one.
    void put_part(const Finishing<T>& f, int64_t outputs, const int32_t* sums) const {
        uint8_t residual[kPanelSums] = {}, also[kPanelSums];
        T y[kPanelSums];
        const auto copy = [&](auto* into, int64_t into_stride, const auto* from, int64_t from_stride) {
            for (int p = 0; p < f.pixels; ++p)
                std::memcpy(static_cast<void*>(into + p * into_stride), from + p * from_stride,
                            outputs * sizeof(*from));
        };
        const int64_t at = f.panels * kPanelOutputs, parameters = f.panels * kPanelParameters;
        const Finishing<T> full = {f.pixels,
                                   1,
                                   kPanelOutputs,
                                   f.residual ? residual : nullptr,
                                   y,
                                   f.parameters + parameters,
                                   f.also ? also : nullptr,
                                   f.also ? f.also_parameters + parameters : nullptr,
                                   f.activation};
        if (f.residual) copy(residual, kPanelOutputs, f.residual + at, f.stride);
        finish_(sums + f.panels * kPanelSums, full);
        copy(f.y + at, f.stride, y, kPanelOutputs);
        if (f.also) copy(f.also + at, f.stride, also, kPanelOutputs);
    }

    // Finishing subtracts the share of the zero points in all taps: adds that of the taps outside of the image.
    void give_back_zeros(const Window& w, int64_t index, int32_t* sums) const {
        const Extent kernel = shape_.kernel;
        if (w.bottom - w.top == kernel.height && w.right - w.left == kernel.width) return;
        const int32_t* of_tap = &zeros_[index * kernel.area() * kPanelOutputs];
        for (int64_t r = 0; r < kernel.height; ++r)
            for (int64_t s = 0; s < kernel.width; ++s, of_tap += kPanelOutputs) {
                if (w.top <= r && r < w.bottom && w.left <= s && s < w.right) continue;
                for (int o = 0; o < kPanelOutputs; ++o) sums[o] += of_tap[o];
            }
    }

    const ConvProblem& problem_;
    const ConvShape& shape_;
    const Tiles& tiles_;
    bool depthwise_, packed_, dense_, split_, direct_;
    int64_t span_, pixel_bytes_, row_bytes_;  // of the image or of a band
    std::vector<int64_t> offsets_;            // of the taps from a pixel's address
    Taps taps_{}, high_taps_{};     // of all codes; of the low and of the high nibbles, where these are apart
    std::vector<int64_t> grouped_;  // taps of depthwise layers, group by group; -1: none
    TapGroups tap_groups_{};
    std::vector<Panel> panels_;
    simd::Vector<int32_t> zeros_;                       // [panels][taps][16], where padding makes taps differ
    std::vector<std::pair<int64_t, int64_t>> columns_;  // taps inside of the image, of each column of the output
    Panels weights_{};                                  // of all blocks
    simd::Vector<int8_t> own_weights_;                  // laid out here
    simd::Vector<float> parameters_, also_parameters_;  // [panels][fields][16]
    T* y_;
    Finisher<T> finish_;
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
