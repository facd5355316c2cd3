// What conv2d_integer on the CPU needs of a layer whatever the size of its images: weights, parameters and the share
// of zero points, laid out as the tiles of an instruction set read them. A call may lay them out for itself, or take
// bytes that were laid out before (prepare_layer).
#pragma once

#include <span>
#include <vector>

#include "conv_finish.h"
#include "conv_winograd.h"

namespace ptq4cuda {

// Output channels of which 16 are finished together.
struct Panel {
    int64_t output;   // the first
    int64_t outputs;  // how many there are
    int64_t channel;  // the first input channel
};

// How the channels of a depthwise layer make blocks of panels.
struct Blocks {
    int32_t panels;  // of a block
    int32_t whole;   // the last block begins early enough to be full, and does some channels again
    int32_t mixed;   // sums of a block are in the order of place_in_block
};

inline std::vector<Panel> panels_of(const ConvShape& shape, const Blocks& blocks) {
    std::vector<Panel> panels;
    if (!shape.depthwise()) {
        panels.reserve(shape.groups * shape.panels_per_group());
        for (int64_t g = 0; g < shape.groups; ++g)
            for (int64_t o = 0; o < shape.group_outputs(); o += kPanelOutputs)
                panels.push_back({g * shape.group_outputs() + o,
                                  std::min<int64_t>(kPanelOutputs, shape.group_outputs() - o),
                                  g * shape.group_channels()});
        return panels;
    }
    const int64_t channels = shape.channels, block = blocks.panels * kPanelOutputs;
    for (int64_t b = 0; b < channels; b += block) {
        const int64_t first = blocks.whole ? std::max<int64_t>(0, std::min(b, channels - block)) : b;
        const int64_t count = std::min(block, channels - first);
        for (int64_t i = 0; i < block; i += kPanelOutputs)
            panels.push_back({first + i, std::clamp<int64_t>(count - i, 0, kPanelOutputs), first});
    }
    return panels;
}

class ConvLayer {
public:
    // Lays out what the arguments of the operator hold, for one call, or to be kept: then it may take longer.
    ConvLayer(const ConvProblem& problem, bool kept) : ConvLayer(problem.shape, problem.span) {
        const std::vector<float> largest = largest_sums(problem, kept);
        const bool in_range = stays_in_range(problem, largest);
        std::vector<std::optional<Line>> lines(problem.shape.out_channels);
        if (kept && in_range) lines = lines_of(problem, largest);
        std::optional<WindowWeights> windows;
        if (kept && is_windowed(problem.shape) && !tiles_.narrow_sums && !matrices())
            windows = window_weights(problem.shape, problem.weight, problem.x);
        begin(problem.weight, {problem.activation.negative_slope, problem.activation.upper, in_range,
                               problem.zero_sums != nullptr, problem.also != nullptr, problem.residual != nullptr,
                               problem.out_quantizer.scale != nullptr, windows.has_value()});
        lay_out(
            [&](int64_t o) {
                std::array<float, kFields> fields = parameters_of(problem, problem.out_quantizer, o);
                if (!lines[o]) return fields;
                fields[kFactor] = lines[o]->factor;
                fields[kOffset] = lines[o]->offset;
                return fields;
            },
            [&](int64_t o) { return parameters_of(problem, problem.also_quantizer, o); },
            [&](int64_t t, int64_t o) { return problem.zero_sums[t * problem.shape.out_channels + o]; });
        if (!windows) return;
        const auto put = [&](Part part, const auto& values) {
            std::memcpy(own_.data() + offset(part), values.data(), values.size() * sizeof values[0]);
        };
        put(kWindowWeights, windows->weights);
        put(kOfWindows, windows->fields);
    }

    // Takes what bytes() of a layer of this shape and these weights returned, on whatever processor. They are looked
    // at, not copied, where they were laid out for the same tiles. Fails where they are not those of such a layer.
    ConvLayer(const ConvShape& shape, int64_t span, const int8_t* weight, std::span<const uint8_t> bytes)
        : ConvLayer(shape, span) {
        const char* op = "run_layers";
        Header header;
        STD_TORCH_CHECK(bytes.size() >= sizeof header, op, ": ", bytes.size(), " bytes hold no prepared layer");
        std::memcpy(&header, bytes.data(), sizeof header);
        STD_TORCH_CHECK(header.magic == kMagic && 0 < header.blocks.panels && header.blocks.panels <= kTilePixels &&
                            (!header.facts.windows || is_windowed(shape)),
                        op, ": the bytes hold no prepared layer");
        if (header.tiles == tile_kind() && header.blocks.panels == blocks_.panels &&
            header.blocks.whole == blocks_.whole) {
            begin(weight, header.facts);
            STD_TORCH_CHECK(static_cast<int64_t>(bytes.size()) == size(), op, ": a layer was prepared in ",
                            bytes.size(), " bytes, this one takes ", size());
            point_into(bytes.data());
            return;
        }
        // Of another instruction set: laid out anew.
        ConvLayer other(shape, span, header.blocks);
        other.begin(weight, header.facts);
        const int64_t least = other.offset(kWeights);  // the weights of other tiles are of no use
        STD_TORCH_CHECK(static_cast<int64_t>(bytes.size()) >= least, op, ": a layer was prepared in ", bytes.size(),
                        " bytes, this one takes ", least);
        other.point_into(bytes.data());
        header.facts.windows = 0;
        begin(weight, header.facts);
        std::vector<std::pair<int64_t, int64_t>> places(shape.out_channels);  // panel and lane of each output
        for (size_t i = 0; i < other.panels_.size(); ++i)
            for (int64_t j = 0; j < other.panels_[i].outputs; ++j)
                places[other.panels_[i].output + j] = other.place(i, j);
        const auto fields = [&](const float* from, int64_t o) {
            std::array<float, kFields> values;
            for (int f = 0; f < kFields; ++f)
                values[f] = from[places[o].first * kPanelParameters + f * kPanelOutputs + places[o].second];
            return values;
        };
        lay_out(
            [&](int64_t o) { return fields(other.parameters_, o); },
            [&](int64_t o) { return fields(other.also_parameters_, o); },
            [&](int64_t t, int64_t o) {
                return other.zeros_[(places[o].first * shape.kernel.area() + t) * kPanelOutputs + places[o].second];
            });
    }

    ConvLayer(const ConvLayer&) = delete;
    ConvLayer& operator=(const ConvLayer&) = delete;

    // As they were laid out by the first constructor.
    std::span<const uint8_t> bytes() const { return own_; }

    const Tiles& tiles() const { return tiles_; }
    // Those that multiply this layer, if there are any. (A panel alone, as up to 16 outputs of a group are, fills
    // half of the sums that they hold.)
    const MatrixTiles* matrices() const {
        return !depthwise_ && !packed_ && shape_.panels_per_group() > 1 ? tiles_.matrices : nullptr;
    }
    bool depthwise() const { return depthwise_; }
    bool packed() const { return packed_; }
    bool dense() const { return dense_; }
    bool split() const { return split_; }
    int64_t span() const { return std::abs(span_); }
    int64_t code_bytes() const { return dense_ ? kWordChannels / tiles_.dense_codes : 1; }
    // Words of the taps of a kernel's row where these follow each other without gaps.
    int64_t dense_words() const {
        return ceil_div(shape_.kernel.width * shape_.channels * code_bytes(), kWordChannels);
    }
    int block_panels() const { return depthwise_ ? blocks_.panels : 1; }
    int64_t blocks() const { return static_cast<int64_t>(panels_.size()) / block_panels(); }
    const std::vector<Panel>& panels() const { return panels_; }
    const std::vector<int64_t>& grouped() const { return grouped_; }
    bool columns() const { return shape_.kernel.height == 3 && tiles_.depthwise_taps == 4; }
    // Sums of a block of panels, their parameters and zeros are in the order of place_in_block.
    bool block_order() const { return depthwise_ && blocks_.mixed && facts_.codes && facts_.in_range; }
    const Panels& weights() const { return weights_; }
    const int32_t* zeros() const { return zeros_; }  // nullptr where padding makes no difference
    const float* parameters(int64_t panel) const { return parameters_ + panel * kPanelParameters; }
    const float* also_parameters(int64_t panel) const { return also_parameters_ + panel * kPanelParameters; }
    Activation activation() const { return {facts_.negative_slope, facts_.upper}; }
    bool in_range() const { return facts_.in_range; }
    // What it was prepared for: outputs in codes, a second one, a residual.
    bool returns_codes() const { return facts_.codes; }
    bool has_also() const { return facts_.also; }
    bool has_residual() const { return facts_.residual; }
    // Whether it has weights for windows (conv_winograd.h).
    bool windowed() const { return facts_.windows; }
    Panels weights_of_windows() const { return {window_weights_, kPositions * shape_.channels * kPanelOutputs, 0}; }
    const int32_t* window_fields(int64_t panel) const { return fields_ + panel * kWindowFields * kPanelOutputs; }

private:
    struct Facts {
        float negative_slope, upper;
        uint8_t in_range, zeros, also, residual, codes, windows;  // 0: no
    };
    static constexpr uint64_t kMagic = 0x36726579616c3471;  // changes with what follows
    struct alignas(simd::kLine) Header {
        uint64_t magic;
        int32_t tiles;  // see tile_kind
        Blocks blocks;
        Facts facts;
    };
    enum Part { kParameters, kAlsoParameters, kZeros, kWeights, kWindowWeights, kOfWindows, kEnd };

    ConvLayer(const ConvShape& shape, int64_t span)
        : ConvLayer(shape, span,
                    {best_tiles().depthwise_panels, best_tiles().whole_blocks, best_tiles().block_order}) {}

    ConvLayer(const ConvShape& shape, int64_t span, const Blocks& blocks)
        : shape_(shape),
          tiles_(best_tiles()),
          blocks_(blocks),
          span_(span),
          depthwise_(shape.depthwise()),
          packed_(shape.packed()),
          dense_(shape.groups == 1 && shape.channels < kWordChannels && shape.dilation.width == 1 &&
                 (span < 0 || !tiles_.narrow_sums)),
          split_(span < 0 && tiles_.narrow_sums && !dense_ && !depthwise_ &&
                 !packed_),  // packed codes are nibbles already
          panels_(panels_of(shape, blocks)) {
        if (depthwise_) group_taps();
    }

    // What tells tiles apart: how they want weights.
    int32_t tile_kind() const { return tiles_.depthwise_taps << 8 | tiles_.dense_codes << 1 | tiles_.narrow_sums; }

    // Row by row, or three rows of a column and a tap that is missing.
    void group_taps() {
        const Extent k = shape_.kernel;
        for (int64_t i = 0; i < k.area(); ++i) {
            if (columns() && i > 0 && i % 3 == 0) grouped_.push_back(-1);
            grouped_.push_back(columns() ? i % 3 * k.width + i / 3 : i);
        }
        while (grouped_.size() % tiles_.depthwise_taps) grouped_.push_back(-1);
    }

    void begin(const int8_t* weight, const Facts& facts) {
        facts_ = facts;
        const bool own = depthwise_ || dense_;
        const int64_t words = depthwise_ ? static_cast<int64_t>(grouped_.size()) / tiles_.depthwise_taps
                              : dense_   ? shape_.kernel.height * dense_words()
                                         : shape_.panel_words();
        weights_ = {own ? nullptr : weight, words * block_panels() * kPanelOutputs * kWordChannels, 0};
        canonical_ = weight;
    }

    // Where a part begins.
    int64_t offset(Part part) const {
        const int64_t panels = panels_.size();
        const bool padded = shape_.padding.height + shape_.padding.width > 0, windows = facts_.windows;
        const int64_t sizes[] = {
            panels * kPanelParameters * static_cast<int64_t>(sizeof(float)),
            facts_.also ? panels * kPanelParameters * static_cast<int64_t>(sizeof(float)) : 0,
            facts_.zeros && padded
                ? panels * shape_.kernel.area() * kPanelOutputs * static_cast<int64_t>(sizeof(int32_t))
                : 0,
            depthwise_ || dense_ ? blocks() * weights_.bytes : 0,
            windows ? kPositions * panels * shape_.channels * kPanelOutputs : 0,
            windows ? panels * kWindowFields * kPanelOutputs * static_cast<int64_t>(sizeof(int32_t)) : 0};
        int64_t at = sizeof(Header);
        for (int p = 0; p < part; ++p) at += ceil_div(sizes[p], simd::kLine) * simd::kLine;
        return at;
    }
    int64_t size() const { return offset(kEnd); }

    // The panel and the lane where what belongs to output j of panel i is laid out.
    std::pair<int64_t, int64_t> place(int64_t i, int64_t j) const {
        if (!block_order()) return {i, j};
        const int64_t in_block = i % blocks_.panels,
                      at = place_in_block(in_block * kPanelOutputs + j, blocks_.panels);
        return {i - in_block + at / kPanelOutputs, at % kPanelOutputs};
    }

    void point_into(const uint8_t* bytes) {
        const auto part = [&]<class T>(Part p, const T*& to) {
            to = offset(p) < offset(static_cast<Part>(p + 1)) ? reinterpret_cast<const T*>(bytes + offset(p))
                                                              : nullptr;
        };
        part(kParameters, parameters_);
        part(kAlsoParameters, also_parameters_);
        part(kZeros, zeros_);
        if (depthwise_ || dense_) part(kWeights, weights_.weights);
        part(kWindowWeights, window_weights_);
        part(kOfWindows, fields_);
    }

    // The fields of each output, those of the second output, and the zero points' share in a tap of an output.
    template <class FieldsOf, class AlsoFieldsOf, class ZerosOf>
    void lay_out(const FieldsOf& fields_of, const AlsoFieldsOf& also_fields_of, const ZerosOf& zeros_of) {
        own_.assign(size(), 0);
        const Header header = {kMagic, tile_kind(), blocks_, facts_};
        std::memcpy(own_.data(), &header, sizeof header);
        point_into(own_.data());
        const auto each = [&](auto f) {
            for (size_t i = 0; i < panels_.size(); ++i)
                for (int64_t j = 0; j < panels_[i].outputs; ++j) f(i, j, panels_[i].output + j);
        };
        const auto put = [&](Part part, const auto& of) {
            float* to = reinterpret_cast<float*>(own_.data() + offset(part));
            std::vector<uint8_t> lowest(shape_.out_channels), highest(shape_.out_channels);
            for (size_t i = 0; i < panels_.size(); ++i)
                for (const int64_t fact : {kOnLine, kFromZero}) to[i * kPanelParameters + fact] = 1.0f;
            each([&](size_t i, int64_t j, int64_t o) {
                const auto values = of(o);
                const auto [panel, lane] = place(i, j);
                for (int f = 0; f < kFields; ++f) to[panel * kPanelParameters + f * kPanelOutputs + lane] = values[f];
                if (std::isnan(values[kOffset])) to[panel * kPanelParameters + kOnLine] = 0.0f;
                if (simd::reinterpret<int32_t>(values[kZeroSum]) != 0 || values[kResidualZeroPoint] != 0.0f ||
                    values[kZeroPoint] != 0.0f || values[kLowest] != 0.0f)
                    to[panel * kPanelParameters + kFromZero] = 0.0f;
                lowest[o] = static_cast<uint8_t>(values[kLowest]);
                highest[o] = static_cast<uint8_t>(values[kHighest]);
            });
            for (size_t i = 0; i < panels_.size(); ++i) {
                const int64_t first = std::min(panels_[i].output, shape_.out_channels);
                const int64_t count = std::min(kStripOutputs, shape_.out_channels - first);
                std::memcpy(to + i * kPanelParameters + kLowestCodes, lowest.data() + first, count);
                std::memcpy(to + i * kPanelParameters + kHighestCodes, highest.data() + first, count);
            }
        };
        put(kParameters, fields_of);
        if (facts_.also) put(kAlsoParameters, also_fields_of);
        const int64_t area = shape_.kernel.area();
        if (zeros_) {
            int32_t* to = reinterpret_cast<int32_t*>(own_.data() + offset(kZeros));
            each([&](size_t i, int64_t j, int64_t o) {
                const auto [panel, lane] = place(i, j);
                for (int64_t t = 0; t < area; ++t) to[(panel * area + t) * kPanelOutputs + lane] = zeros_of(t, o);
            });
        }
        if (depthwise_ || dense_) lay_out_weights(own_.data() + offset(kWeights));
    }

    // As the tiles want them, where these are not the panels: of depthwise layers, and of dense ones, from single
    // pixels to rows without gaps.
    void lay_out_weights(uint8_t* to) const {
        const int in_word = depthwise_ ? tiles_.depthwise_taps : tiles_.dense_codes;
        in_word == kWordChannels ? lay_out_weights_as<int8_t>(to) : lay_out_weights_as<int16_t>(to);
    }

    template <class Weight>
    void lay_out_weights_as(uint8_t* at) const {
        constexpr int64_t kInWord = kWordChannels / sizeof(Weight);
        for (int64_t b = 0; b < blocks(); ++b) {
            Weight* to = reinterpret_cast<Weight*>(at + b * weights_.bytes);
            depthwise_ ? lay_out_block<kInWord>(b, to) : lay_out_dense_panel<kInWord>(b, to);
        }
    }

    template <int64_t kInWord, class Weight>
    void lay_out_block(int64_t b, Weight* to) const {
        const int64_t first = panels_[b * block_panels()].channel, taps = grouped_.size();
        const int64_t channels = block_panels() * kPanelOutputs;
        for (int64_t c = 0; c < std::min(channels, shape_.channels - first); ++c) {
            const int8_t* from = canonical_ + first + c;
            Weight* words = to + place_in_block(c, block_panels()) * kInWord;
            for (int64_t t = 0; t < taps; ++t)
                if (grouped_[t] >= 0)
                    words[t / kInWord * channels * kInWord + t % kInWord] = from[grouped_[t] * shape_.channels];
        }
    }

    template <int64_t kInWord, class Weight>
    void lay_out_dense_panel(int64_t b, Weight* to) const {
        const Extent kernel = shape_.kernel;
        const int8_t* from = canonical_ + b * kernel.area() * kPanelOutputs * kWordChannels;
        for (int64_t r = 0; r < kernel.height; ++r, to += dense_words() * kPanelOutputs * kInWord)
            for (int64_t s = 0; s < kernel.width; ++s)
                for (int64_t o = 0; o < kPanelOutputs; ++o, from += kWordChannels)
                    for (int64_t c = 0; c < shape_.channels; ++c) {
                        const int64_t at = s * shape_.channels + c;
                        to[(at / kInWord * kPanelOutputs + o) * kInWord + at % kInWord] = from[c];
                    }
    }

    ConvShape shape_;  // of which sizes of images are of no account
    const Tiles& tiles_;
    Blocks blocks_;
    int64_t span_;
    bool depthwise_, packed_, dense_, split_;
    std::vector<Panel> panels_;
    std::vector<int64_t> grouped_;  // taps of depthwise layers, group by group; -1: none
    Facts facts_{};
    const int8_t* canonical_ = nullptr;                               // the weights as the operator takes them
    Panels weights_{};                                                // of all blocks
    const float *parameters_ = nullptr, *also_parameters_ = nullptr;  // [panels][fields][16]
    const int32_t* zeros_ = nullptr;                                  // [panels][taps][16]
    const int8_t* window_weights_ = nullptr;                          // see WindowWeights
    const int32_t* fields_ = nullptr;
    simd::Vector<uint8_t> own_;
};

}  // namespace ptq4cuda
