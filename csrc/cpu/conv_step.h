// A convolution of images on the CPU, as a step (steps.h): integer sums tile by tile (conv_tiles.h), finished while
// they are in cache (conv_finish.h).
//
// The work is cut into units of neighbouring output pixels. A unit's input stays in the second-level cache while the
// panels of weights pass by, a few at a time, and these stay in the first-level cache while they meet all tiles of
// the unit. Nothing is unfolded (but for some matrices, conv_tiles_amx.cpp): a tile reads each tap of its pixels
// where it lies. Where the image is padded, the rows that a unit needs are copied into a band with zeros around them;
// also where channels do not fill words, and where codes are split into nibbles or widened to 16 bits.
//
// Where a layer has weights for windows (conv_winograd.h), a unit is windows of neighbouring outputs instead. They
// are transformed once, and meet some panels in each position; what comes of that is in cache while it is
// transformed.
#pragma once

#include "conv_layer.h"
#include "link.h"

namespace ptq4cuda {

constexpr int64_t kUnitBytes = 64 << 10;          // of input
constexpr int64_t kUnitPixels = 1024;             // at most
constexpr int64_t kMinimumUnitPixels = 24;        // less does not pay for reading all weights
constexpr int64_t kBandBytes = 64 << 20;          // of more than one row of outputs, at most
constexpr int64_t kPanelBytes = 16 << 10;         // of weights that meet a tile before the next tile
constexpr int64_t kMatrixWeights = 1 << 20;       // bytes of a part of the output channels, in matrices
constexpr int64_t kTaskProducts = 1 << 17;        // worth a task
constexpr int64_t kTransformedBytes = 256 << 10;  // of the transformed windows of a unit
constexpr int64_t kWindowPanels = 2;              // that meet them together: products of all positions stay in cache

// What a call convolves, and where the outputs go. Of x and of the outputs there may be only the rows from one on:
// rows are counted through all images.
template <class T>
struct ConvCall {
    const uint8_t* x;         // [N, H, W, pixel_bytes()]
    const uint8_t* residual;  // [N, out H, out W, O], or nullptr
    T* y;
    uint8_t* also;  // or nullptr
    int64_t x_from = 0, y_from = 0, also_from = 0;
};

template <class T>
class Convolution : public Link {
public:
    // The shape is the layer's, with the sizes of the images.
    Convolution(std::unique_ptr<const ConvLayer> layer, const ConvShape& shape)
        : layer_(std::move(layer)),
          shape_(shape),
          tiles_(layer_->tiles()),
          depthwise_(layer_->depthwise()),
          packed_(layer_->packed()),
          dense_(layer_->dense()),
          split_(layer_->split()),
          matrices_(shape.pixels() < kMatrixRows ? nullptr : layer_->matrices()),  // they would be mostly empty
          windowed_(!matrices_ && layer_->windowed() && pays_in_windows()),
          finish_(finisher_of<T>(layer_->has_residual(), layer_->activation(), layer_->in_range())) {
        const bool whole_words = depthwise_ || shape_.group_channels() % kWordChannels == 0;
        direct_ = whole_words && !split_ && !packed_ && shape_.padding.height + shape_.padding.width == 0;
        // In a band, channels are filled up to whole words where all are read together.
        const bool filled = !direct_ && shape_.groups == 1;
        pixel_bytes_ = dense_   ? shape_.channels * layer_->code_bytes()
                       : filled ? shape_.words_per_tap() * kWordChannels
                                : shape_.channels;
        row_bytes_ = (shape_.in.width + (direct_ ? 0 : 2 * shape_.padding.width)) * pixel_bytes_;
        find_taps();
        if (matrices_) chunks_ = Chunks(taps_);
        // What is multiplied for the places between the rows must not outweigh what gathering would take.
        grid_ = !direct_ && !chunks_.in_place.empty() && shape_.stride.area() == 1 &&
                shape_.group_channels() % simd::kLine == 0 && 4 * row_bytes_ <= 6 * shape_.out.width * pixel_bytes_;
        if (layer_->zeros()) sum_zeros();
        cut();
    }

    // What the next runs convolve.
    void place(const ConvCall<T>& call) { call_ = call; }

    int64_t tasks() const override { return units_ * parts_; }

    void run(Tasks& tasks, Scratch& scratch) const override {
        Unit unit(call_, scratch);
        int64_t held = -1;
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t u = parts_apart_ ? task % units_ : task / parts_;
            const int64_t part = parts_apart_ ? task / units_ : task % parts_, blocks = layer_->blocks();
            if (u != held) take(u, unit);
            held = u;
            compute(unit, blocks * part / parts_, blocks * (part + 1) / parts_);
        }
    }

    const Geometry& geometry() const override { return shape_; }

    void rows(const Bands& bands, int64_t n, int64_t top, int64_t bottom, Scratch& scratch) const override {
        ConvCall<T> call = call_;
        const auto stand_in = [](const Band& band, auto& codes, int64_t& from) {
            if (!band.codes) return;
            codes = reinterpret_cast<std::remove_reference_t<decltype(codes)>>(band.codes);
            from = band.from;
        };
        stand_in(bands.in[0], call.x, call.x_from);
        stand_in(bands.out[0], call.y, call.y_from);
        stand_in(bands.out[1], call.also, call.also_from);
        Unit unit(call, scratch);
        const int64_t row = n * shape_.out.height;
        if (windowed_) {
            const Area area = {n, top, bottom};
            for (int64_t first = 0, end = windows_of(area); first < end; first += unit_size_) {
                take_windows(area, first, std::min(end, first + unit_size_), unit);
                compute(unit, 0, layer_->blocks());
            }
        } else if (direct_) {
            for (int64_t first = (row + top) * shape_.out.width, end = (row + bottom) * shape_.out.width; first < end;
                 first += unit_size_) {
                take_pixels(first, std::min(end, first + unit_size_), unit);
                compute(unit, 0, layer_->blocks());
            }
        } else {
            for (; top < bottom; top += unit_size_) {
                take_band(n, top, std::min(bottom, top + unit_size_), unit);
                compute(unit, 0, layer_->blocks());
            }
        }
    }

private:
    void find_taps() {
        const Extent k = shape_.kernel, d = shape_.dilation;
        // The taps of a row follow each other in memory, as their weights do.
        const bool joined = shape_.groups == 1 && d.width == 1 && !packed_;
        for (int64_t r = 0; r < k.height; ++r)
            for (int64_t s = 0; s < (joined ? 1 : k.width); ++s)
                offsets_.push_back(r * d.height * row_bytes_ + s * d.width * pixel_bytes_);
        if (depthwise_) {
            std::vector<int64_t> offsets;
            for (int64_t tap : layer_->grouped())
                offsets.push_back(tap < 0 ? 0 : offsets_[tap]);  // its weights are zero
            offsets_ = std::move(offsets);
            tap_groups_ = {offsets_.data(), static_cast<int64_t>(offsets_.size()) / tiles_.depthwise_taps,
                           layer_->columns()};
            return;
        }
        const auto taps = [&](int64_t words) {
            return Taps{offsets_.data(), static_cast<int64_t>(offsets_.size()), words};
        };
        taps_ = taps(dense_    ? layer_->dense_words()
                     : packed_ ? shape_.low_bytes * 2 / kWordChannels
                               : shape_.words_per_tap() * (joined ? k.width : 1));
        high_taps_ = taps(packed_ ? shape_.high_bytes() * 2 / kWordChannels : taps_.words);
    }

    // Units of pixels, or of rows where they need a band; where units are few, their output channels are shared out,
    // too.
    void cut() {
        const Extent out = shape_.out;
        const double products = static_cast<double>(shape_.pixels()) * static_cast<double>(shape_.out_channels) *
                                static_cast<double>(shape_.kernel.area() * shape_.group_channels());
        const int64_t tasks = torch::stable::get_num_threads() * kTasksPerThread;
        const int64_t wanted = products < static_cast<double>(tasks * kTaskProducts)
                                   ? static_cast<int64_t>(products) / kTaskProducts + 1
                                   : tasks;
        // A thread reads either all units for some outputs, or some units for all outputs: whatever are less bytes,
        // of which those that another thread has written come from afar, as its neighbours' outputs do.
        const int64_t panel = windowed_ ? layer_->weights_of_windows().bytes : layer_->weights().bytes;
        const int64_t weights = layer_->blocks() * panel;
        const int64_t outputs = sizeof(T) + layer_->has_also() + layer_->has_residual();
        parts_apart_ = weights > 2 * shape_.batch * shape_.in.height * row_bytes_ +
                                     shape_.pixels() * shape_.out_channels * outputs;
        // Of the columns and rows between windows nothing is read.
        const int64_t read = std::min(shape_.stride.height, shape_.kernel.height) *
                             std::min(shape_.stride.width, shape_.kernel.width) * pixel_bytes_;
        const int64_t tile = matrices_ ? kMatrixPixels : kTilePixels;
        int64_t pixels = std::clamp(kUnitBytes / read, std::max(tile, kMinimumUnitPixels), kUnitPixels);
        // What is gathered for matrices meets all panels: rather than these, pixels are shared out.
        if (matrices_ && !parts_apart_)
            pixels = std::clamp(ceil_div(ceil_div(shape_.pixels(), wanted), tile) * tile, tile, pixels);
        // Of nearly equal size, in whole tiles.
        const auto even = [](int64_t total, int64_t most, int64_t step) {
            const int64_t size = ceil_div(total, ceil_div(total, most));
            return std::min(ceil_div(size, step) * step, most);
        };
        if (windowed_) {
            const int64_t windows = shape_.batch * windows_of(whole());
            const int64_t most = kTransformedBytes / (kPositions * shape_.channels);
            unit_size_ = even(windows, std::clamp<int64_t>(most, kTilePixels, kUnitPixels), 1);
            units_ = ceil_div(windows, unit_size_);
        } else if (direct_) {
            unit_size_ = even(shape_.pixels(), pixels, tile);
            units_ = ceil_div(shape_.pixels(), unit_size_);
        } else {
            // However far apart rows of outputs are, their band must not outgrow memory.
            const int64_t most = std::max<int64_t>(kBandBytes / row_bytes_ / shape_.stride.height, 1);
            unit_size_ = even(out.height, std::clamp<int64_t>(std::min(pixels / out.width, most), 1, out.height), 1);
            units_ = shape_.batch * ceil_div(out.height, unit_size_);
        }
        // The weights that meet one tile of matrices after the other must stay in the second-level cache meanwhile.
        const int64_t shares = matrices_ ? ceil_div(weights, kMatrixWeights) : 1;
        parts_ = std::clamp<int64_t>(std::max(ceil_div(wanted, units_), shares), 1, layer_->blocks());
    }

    // --- the input of a unit

    // Rows of outputs of an image and of those after it, cut into windows of 2x2 (conv_winograd.h) row by row.
    struct Area {
        int64_t image, top, bottom;
    };
    struct Unit {
        const ConvCall<T>& call;
        int64_t first = 0;                    // output pixel; the others follow
        std::vector<const uint8_t*>& pixels;  // where each of them reads its first tap
        std::vector<const int32_t*> zeros;    // see zeros_of; of each of them, if zero points have a share
        Scratch& scratch;                     // holds the band
        int64_t plane = 0;              // bytes from the high nibbles to the low ones, from position to position
        Area area{};                    // of windows: `first` and the others
        int32_t (*codes)[4] = nullptr;  // of each of them: see transform_window

        Unit(const ConvCall<T>& call_, Scratch& scratch_)
            : call(call_), pixels(scratch_.pointers), scratch(scratch_) {}
    };

    void take(int64_t u, Unit& unit) const {
        if (windowed_)
            return take_windows(whole(), u * unit_size_,
                                std::min((u + 1) * unit_size_, shape_.batch * windows_of(whole())), unit);
        if (direct_) return take_pixels(u * unit_size_, std::min((u + 1) * unit_size_, shape_.pixels()), unit);
        const int64_t bands = ceil_div(shape_.out.height, unit_size_), top = u % bands * unit_size_;
        take_band(u / bands, top, std::min(top + unit_size_, shape_.out.height), unit);
    }

    void take_pixels(int64_t first, int64_t end, Unit& unit) const {
        const Extent in = shape_.in, out = shape_.out, stride = shape_.stride;
        unit.first = first;
        unit.pixels.resize(end - first);
        for (int64_t i = first; i < end;) {  // row by row
            const int64_t row = i / out.width, column = i % out.width, n = row / out.height;
            const int64_t last = std::min(end, i + out.width - column), step = stride.width * pixel_bytes_;
            const uint8_t* x = unit.call.x +
                               (n * in.height + row % out.height * stride.height - unit.call.x_from) * row_bytes_ +
                               column * step;
            for (; i < last; ++i, x += step) unit.pixels[i - first] = x;
        }
    }

    void take_band(int64_t n, int64_t top, int64_t bottom, Unit& unit) const {
        const Extent in = shape_.in, out = shape_.out, stride = shape_.stride, pad = shape_.padding;
        const int64_t height = shape_.rows_read(bottom - top);
        unit.plane = height * row_bytes_ + kWordChannels;  // the last word may reach beyond the last channel
        const int64_t planes = split_ ? 2 : 1, margin = pad.width * pixel_bytes_;
        uint8_t* band = unit.scratch.at_least(planes * unit.plane + (grid_ ? kMatrixPixels * pixel_bytes_ : 0));
        const auto clear = [&](int64_t from, int64_t bytes) {
            for (int64_t p = 0; p < planes; ++p) std::memset(band + p * unit.plane + from, 0, bytes);
        };
        for (int64_t i = 0, at = 0; i < height; ++i, at += row_bytes_) {
            const int64_t row = top * stride.height - pad.height + i;
            if (row < 0 || row >= in.height) {
                clear(at, row_bytes_);
                continue;
            }
            clear(at, margin);
            copy_row(unit.call.x + (n * in.height + row - unit.call.x_from) * in.width * shape_.pixel_bytes(),
                     band + at + margin, unit.plane);
            clear(at + row_bytes_ - margin, margin);
        }
        clear(height * row_bytes_, kWordChannels);
        unit.first = (n * out.height + top) * out.width;
        unit.pixels.resize((bottom - top) * out.width);
        unit.zeros.clear();
        for (int64_t r = 0; r < bottom - top; ++r) {
            const uint8_t* row = band + r * stride.height * row_bytes_;
            for (int64_t c = 0; c < out.width; ++c)
                unit.pixels[r * out.width + c] = row + c * stride.width * pixel_bytes_;
            if (!layer_->zeros()) continue;
            for (int64_t c = 0; c < out.width; ++c) unit.zeros.push_back(zeros_of(top + r, c));
        }
    }

    Area whole() const { return {0, 0, shape_.out.height}; }
    int64_t windows_across() const { return ceil_div(shape_.out.width, 2); }
    int64_t windows_of(const Area& area) const { return ceil_div(area.bottom - area.top, 2) * windows_across(); }
    // Where outputs are few, much of their windows is outside of the image.
    bool pays_in_windows() const { return 5 * kPositions * windows_of(whole()) < 4 * 9 * shape_.out.area(); }

    // The image, and the output that is the first of a window.
    struct Place {
        int64_t image, row, column;
    };
    Place place(const Area& area, int64_t window) const {
        const int64_t count = windows_of(area), i = window % count;
        return {area.image + window / count, area.top + i / windows_across() * 2, i % windows_across() * 2};
    }

    // Geometry as they are multiplied; of what is outside of the image, or of no account for the rows of the area,
    // zeros.
    void take_windows(const Area& area, int64_t first, int64_t end, Unit& unit) const {
        const int64_t channels = shape_.channels, count = end - first;
        unit.area = area;
        unit.first = first;
        unit.pixels.resize(count);
        unit.plane = count * channels + simd::kLine;  // lines of the same place in the cache would be too many
        uint8_t* to = unit.scratch.at_least(kPositions * unit.plane +
                                            count * static_cast<int64_t>(sizeof *unit.codes) + channels);
        unit.codes = reinterpret_cast<int32_t (*)[4]>(to + kPositions * unit.plane);
        uint8_t* const nothing = reinterpret_cast<uint8_t*>(unit.codes + count);
        std::memset(nothing, 0, channels);
        const Extent in = shape_.in, pad = shape_.padding;
        const int64_t bottom = std::min(in.height, area.bottom - pad.height + 2), across = windows_across();
        for (int64_t i = 0; i < count;) {  // row by row
            const auto [n, row, column] = place(area, first + i);
            const uint8_t* rows[4];
            for (int64_t r = 0; r < 4; ++r) {
                const int64_t y = row - pad.height + r;
                rows[r] = 0 <= y && y < bottom
                              ? unit.call.x + (n * in.height + y - unit.call.x_from) * in.width * channels
                              : nullptr;
            }
            const int64_t last = std::min(count, i + across - column / 2);
            for (int64_t left = column - pad.width; i < last; ++i, left += 2, to += channels) {
                const uint8_t* pixels[kPositions];
                for (int64_t r = 0; r < 4; ++r)
                    for (int64_t s = 0; s < 4; ++s) {
                        const int64_t x = left + s;
                        pixels[4 * r + s] = rows[r] && 0 <= x && x < in.width ? rows[r] + x * channels : nothing;
                    }
                unit.pixels[i] = to;
                transform_window(pixels, channels, unit.plane, to, unit.codes[i]);
            }
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
        } else if (layer_->code_bytes() == sizeof(uint16_t)) {
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

    // --- the share of zero points

    // Which of `count` taps, the first of them at `first` in the padded image, are inside of an image of this size.
    using Taken = std::pair<int64_t, int64_t>;
    static Taken inside(int64_t first, int64_t pad, int64_t size, int64_t step, int64_t count) {
        const int64_t before = std::clamp<int64_t>(ceil_div(pad - first, step), 0, count);
        const int64_t end = std::clamp<int64_t>(ceil_div(pad + size - first, step), before, count);
        return {before, end};
    }

    // Finishing subtracts the share of the zero points in all taps. That of the taps outside of the image is to be
    // added again, and is the same for all outputs whose rows and columns of taps are cut alike.
    void sum_zeros() {
        const auto kinds = [](int64_t outputs, int64_t stride, int64_t pad, int64_t size, int64_t step, int64_t count,
                              std::vector<int64_t>& kind_of) {
            std::vector<Taken> found = {{0, count}};  // first of all, nothing is cut
            for (int64_t i = 0; i < outputs; ++i) {
                const Taken taken = inside(i * stride, pad, size, step, count);
                const auto at = std::find(found.begin(), found.end(), taken);
                kind_of.push_back(at - found.begin());
                if (at == found.end()) found.push_back(taken);
            }
            return found;
        };
        const Extent k = shape_.kernel, in = shape_.in, out = shape_.out, d = shape_.dilation, pad = shape_.padding;
        const auto rows =
            kinds(out.height, shape_.stride.height, pad.height, in.height, d.height, k.height, row_kind_);
        const auto columns =
            kinds(out.width, shape_.stride.width, pad.width, in.width, d.width, k.width, column_kind_);
        const int64_t panels = static_cast<int64_t>(layer_->panels().size());
        column_kinds_ = static_cast<int64_t>(columns.size());
        for (const auto& [top, bottom] : rows)
            for (const auto& [left, right] : columns) {
                const size_t first = zeros_.size();
                zeros_.resize(first + panels * kPanelOutputs);
                const int32_t* of_tap = layer_->zeros();
                for (int64_t i = 0; i < panels; ++i)
                    for (int64_t r = 0; r < k.height; ++r)
                        for (int64_t s = 0; s < k.width; ++s, of_tap += kPanelOutputs) {
                            if (top <= r && r < bottom && left <= s && s < right) continue;
                            for (int o = 0; o < kPanelOutputs; ++o)
                                zeros_[first + i * kPanelOutputs + o] += of_tap[o];
                        }
            }
    }
    // What an output's sums lack, [panels][16]; nullptr: nothing.
    const int32_t* zeros_of(int64_t row, int64_t column) const {
        const int64_t kind = row_kind_[row] * column_kinds_ + column_kind_[column];
        return kind ? &zeros_[kind * static_cast<int64_t>(layer_->panels().size()) * kPanelOutputs] : nullptr;
    }

    // --- the outputs of a unit

    // Blocks begin to end for all pixels of a unit, in tiles of nearly equal size. A few blocks are taken together:
    // their weights stay in cache, and a tile's outputs share lines of memory.
    void compute(const Unit& unit, int64_t begin, int64_t end) const {
        if (windowed_) return compute_windows(unit, begin, end);
        if (matrices_) return compute_matrices(unit, begin, end);
        const int64_t count = unit.pixels.size();
        // Panels that are shared out evenly: a tile of few has more pixels.
        const int64_t most = depthwise_ ? 1 : ceil_div(end - begin, ceil_div(end - begin, int64_t{tiles_.panels}));
        const int64_t most_pixels = depthwise_ ? kTilePixels : tiles_.pixels[most - 1];
        const int64_t tiles = ceil_div(count, most_pixels);
        const int64_t together = std::max(most, kPanelBytes / layer_->weights().bytes / most * most);
        for (int64_t first = begin; first < end; first += together)
            for (int64_t t = 0, pixel = 0; t < tiles; ++t) {
                const int pixels = static_cast<int>((count - pixel) / (tiles - t));
                const int64_t last = std::min(first + together, end);
                prefetch_outputs(unit.call, unit.first + pixel + pixels,
                                 std::min(most_pixels, count - pixel - pixels), first * layer_->block_panels(),
                                 last * layer_->block_panels());
                for (int64_t b = first, n; b < last; b += n) {
                    n = together_at(b, std::min(most, last - b));
                    tile(unit, pixel, pixels, b, n);
                }
                pixel += pixels;
            }
    }

    // The outputs of the next tile, and its residual: their lines lie too far apart to be foreseen.
    // (Products of matrices take no time to speak of: what is asked for during some need not be in the first cache.)
    template <bool kForMatrices = false>
    void prefetch_outputs(const ConvCall<T>& call, int64_t pixel, int64_t count, int64_t first, int64_t last) const {
        const int64_t begin = layer_->panels()[first].output,
                      end = layer_->panels()[last - 1].output + layer_->panels()[last - 1].outputs;
        for (int64_t p = pixel; p < pixel + count; ++p) {
            const auto ask = [&](const auto* row, int64_t from_row) {
                row += (p - from_row * shape_.out.width) * shape_.out_channels;
                const char* from = reinterpret_cast<const char*>(row + begin);
                for (const char* stop = reinterpret_cast<const char*>(row + end); from < stop; from += simd::kLine)
                    __builtin_prefetch(from, kForMatrices ? 0 : 1, kForMatrices ? 2 : 3);
            };
            ask(call.y, call.y_from);
            if (call.residual) ask(call.residual, 0);
            if (call.also) ask(call.also, call.also_from);
        }
    }

    // Some pixels and blocks: sums, then outputs.
    void tile(const Unit& unit, int64_t begin, int count, int64_t b, int64_t n) const {
        const uint8_t* const* pixels = &unit.pixels[begin];
        const int64_t index = b * layer_->block_panels(), channel = layer_->panels()[index].channel;
        const int8_t* weights = layer_->weights().weights + b * layer_->weights().bytes;
        alignas(64) int32_t sums[kTilePanels * kPanelSums];
        const int32_t* const* zeros = layer_->zeros() ? &unit.zeros[begin] : nullptr;
        if (depthwise_) {
            const int64_t block = layer_->block_panels() * kPanelOutputs;
            tiles_.depthwise(pixels, count, channel, tap_groups_, weights, std::min(block, shape_.channels - channel),
                             sums);
            return put(unit.call, unit.first + begin, zeros, count, index, layer_->block_panels(), sums);
        }
        const auto dot = [&](DotTile f, int64_t from, const Taps& taps, int64_t word, int32_t* to) {
            const int8_t* first = weights + word * kPanelOutputs * kWordChannels;
            f(pixels, count, channel + from, taps, layer_->span(),
              {first, layer_->weights().bytes, static_cast<int>(n)}, to);
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
        put(unit.call, unit.first + begin, zeros, count, index, n, sums);
    }

    // The same in matrices: those of the codes of a tile meet all panels.
    void compute_matrices(const Unit& unit, int64_t begin, int64_t end) const {
        const int64_t count = unit.pixels.size(), across = grid_ ? row_bytes_ / pixel_bytes_ : count;
        const int64_t width = grid_ ? shape_.out.width : count;  // pixels of a row; there may be places behind them
        const int64_t places = count + (count / width - 1) * (across - width);
        // Pixels of a tile that are in a row: the first one's place in the tile and in the unit, and how many they
        // are.
        const auto each_row = [&](int64_t place, const auto& f) {
            const int64_t stop = std::min(place + kMatrixPixels, places);
            for (int64_t row = place / across; row * across < stop; ++row) {
                const int64_t from = std::max(place, row * across), to = std::min(stop, row * across + width);
                if (from < to) f(from - place, row * width + from - row * across, static_cast<int>(to - from));
            }
        };
        const Panels weights = layer_->weights();
        alignas(simd::kLine) int32_t sums[kTilePanels * kMatrixPanelSums];
        uint8_t* memory = grid_ ? nullptr : unit.scratch.at_least(unit.scratch.gathered, chunks_.bytes());
        matrices_->begin(chunks_.words);
        for (int64_t place = 0; place < places; place += kMatrixPixels) {
            const int pixels = static_cast<int>(std::min<int64_t>(kMatrixPixels, places - place));
            each_row(place + kMatrixPixels, [&](int64_t, int64_t pixel, int count_in_row) {
                prefetch_outputs<true>(unit.call, unit.first + pixel, count_in_row, begin, end);
            });
            int64_t seen = 0;  // of the tile's places, pixels
            each_row(place, [&](int64_t, int64_t, int count_in_row) { seen += count_in_row; });
            if (seen == 0) continue;
            Matrices matrices[2];
            int64_t channel = -1;  // of what has been gathered
            for (int64_t b = begin, n; b < end; b += n) {
                n = together_at(b, std::min<int64_t>(kTilePanels, end - b));
                if (grid_) {
                    const uint8_t* rows = unit.pixels[0] + place * pixel_bytes_ + layer_->panels()[b].channel;
                    matrices[0] = {rows, pixel_bytes_, chunks_.in_place.data()};
                    matrices[1] = {rows + kMatrixRows * pixel_bytes_, pixel_bytes_, chunks_.in_place.data()};
                } else if (channel != layer_->panels()[b].channel) {
                    channel = layer_->panels()[b].channel;
                    matrices_->gather(&unit.pixels[place], pixels, channel, chunks_, memory, matrices);
                }
                matrices_->multiply(matrices, pixels, chunks_,
                                    {weights.weights + b * weights.bytes, weights.bytes, static_cast<int>(n)}, sums);
                each_row(place, [&](int64_t from, int64_t pixel, int count_in_row) {
                    put(unit.call, unit.first + pixel, layer_->zeros() ? &unit.zeros[pixel] : nullptr, count_in_row,
                        b, n, sums + from * kPanelOutputs, kMatrixPanelSums);
                });
            }
        }
        matrices_->end();
    }

    // How many blocks from one on, of at most so many, read the same channels.
    int64_t together_at(int64_t block, int64_t most) const {
        int64_t n = 1;
        while (n < most && layer_->panels()[block + n].channel == layer_->panels()[block].channel) ++n;
        return n;
    }

    // Panels begin to end for all windows of a unit: products position by position, and what these make.
    void compute_windows(const Unit& unit, int64_t begin, int64_t end) const {
        const int64_t most = std::min<int64_t>(kWindowPanels, tiles_.panels), count = unit.pixels.size();
        const int64_t groups = ceil_div(count, int64_t{tiles_.pixels[most - 1]});
        const Panels weights = layer_->weights_of_windows();
        const int64_t start = 0;
        const Taps positions = {&start, 1, shape_.channels / kWordChannels, kPositions, unit.plane};
        alignas(64) int32_t products[kPositions * kWindowPanels * kPanelSums];
        alignas(64) int32_t sums[2 * kWindowPanels * kPanelSums];
        for (int64_t b = begin, n; b < end; b += n) {
            n = std::min(most, end - b);
            for (int64_t g = 0, window = 0; g < groups; ++g) {
                const int64_t last = window + (count - window) / (groups - g);
                // Geometry side by side, and the pixels of their first row and, if there is one, of their second.
                const auto each_run = [&](const auto& f) {
                    for (int64_t w = window, run; w < last; w += run) {
                        const Place at = place(unit.area, unit.first + w);
                        run = std::min<int64_t>({kTileRow, last - w, windows_across() - at.column / 2});
                        f(w, static_cast<int>(run), at, std::min<int64_t>(2, unit.area.bottom - at.row),
                          (at.image * shape_.out.height + at.row) * shape_.out.width + at.column,
                          static_cast<int>(std::min(2 * run, shape_.out.width - at.column)));
                    }
                };
                each_run([&](int64_t, int, const Place&, int64_t rows, int64_t pixel, int pixels) {
                    for (int64_t a = 0; a < rows; ++a, pixel += shape_.out.width)
                        prefetch_outputs(unit.call, pixel, pixels, b, b + n);
                });
                tiles_.dot(&unit.pixels[window], static_cast<int>(last - window), 0, positions, 0,
                           {weights.weights + b * weights.bytes, weights.bytes, static_cast<int>(n)}, products);
                each_run([&](int64_t w, int run, const Place& at, int64_t rows, int64_t pixel, int pixels) {
                    transform_products(products + (w - window) * kPanelOutputs, run, n, layer_->window_fields(b),
                                       unit.codes + w, sums);
                    for (int64_t a = 0; a < rows; ++a, pixel += shape_.out.width) {
                        const int32_t* zeros[kTilePixels];
                        for (int64_t p = 0; layer_->zeros() && p < pixels; ++p)
                            zeros[p] = zeros_of(at.row + a, at.column + p);
                        put(unit.call, pixel, layer_->zeros() ? zeros : nullptr, pixels, b, n,
                            sums + a * n * kPanelSums);
                    }
                });
                window = last;
            }
        }
    }

    // Finishes the sums of a tile: panels that follow each other, of outputs from a pixel on.
    void put(const ConvCall<T>& call, int64_t pixel, const int32_t* const* zeros, int count, int64_t index, int64_t n,
             int32_t* sums, int64_t panel_sums = kPanelSums) const {
        if (depthwise_ && tiles_.block_order && !layer_->block_order()) put_in_order(count, n, sums);
        for (int p = 0; zeros && p < count; ++p)
            for (int64_t i = 0; zeros[p] && i < n; ++i)
                for (int o = 0; o < kPanelOutputs; ++o)
                    sums[i * panel_sums + p * kPanelOutputs + o] += zeros[p][(index + i) * kPanelOutputs + o];
        int64_t outputs = 0;
        for (int64_t i = 0; i < n; ++i) outputs += layer_->panels()[index + i].outputs;
        const int64_t stride = shape_.out_channels;
        const auto at = [&](int64_t from) {
            return (pixel - from * shape_.out.width) * stride + layer_->panels()[index].output;
        };
        finish_(sums, {count, outputs, stride, panel_sums, layer_->block_order(),
                       call.residual ? call.residual + at(0) : nullptr, call.y + at(call.y_from),
                       layer_->parameters(index), call.also ? call.also + at(call.also_from) : nullptr,
                       call.also ? layer_->also_parameters(index) : nullptr, layer_->activation()});
    }

    // From the order of place_in_block to that of channels.
    static void put_in_order(int count, int64_t panels, int32_t* sums) {
        int32_t block[kTilePanels * kPanelOutputs];
        for (int p = 0; p < count; ++p, sums += kPanelOutputs) {
            for (int64_t i = 0; i < panels; ++i)
                std::memcpy(block + i * kPanelOutputs, sums + i * kPanelSums, kPanelOutputs * sizeof(int32_t));
            for (int64_t c = 0; c < panels * kPanelOutputs; c += 4)
                std::memcpy(sums + c / kPanelOutputs * kPanelSums + c % kPanelOutputs,
                            block + place_in_block(c, static_cast<int>(panels)), 4 * sizeof(int32_t));
        }
    }

    std::unique_ptr<const ConvLayer> layer_;
    ConvShape shape_;
    ConvCall<T> call_{};
    const Tiles& tiles_;
    bool depthwise_, packed_, dense_, split_;
    const MatrixTiles* matrices_;  // nullptr: other tiles are faster
    bool windowed_, direct_;
    bool grid_ = false;  // the pixels of a band, with those around the image, are rows of matrices as they lie
    Finisher<T> finish_;
    int64_t pixel_bytes_, row_bytes_;  // of the image or of a band
    std::vector<int64_t> offsets_;     // of the taps from a pixel's address
    Chunks chunks_;                    // of the same, in matrices
    Taps taps_{}, high_taps_{};        // of all codes; of the low and of the high nibbles, where these are apart
    TapGroups tap_groups_{};
    std::vector<int64_t> row_kind_, column_kind_;  // how the taps of each row and column of outputs are cut
    int64_t column_kinds_ = 0;
    std::vector<int32_t> zeros_;         // see zeros_of, kind by kind
    bool parts_apart_;                   // tasks: part by part, or else unit by unit
    int64_t unit_size_, units_, parts_;  // pixels or rows of a unit; parts of the output channels
};

}  // namespace ptq4cuda
