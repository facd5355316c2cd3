// conv2d_integer before its kernel runs, the same for every backend: arguments are checked, the input becomes
// channels_last, the output is allocated.
//
//     y_o = activation(scale_o * (sum_o - zeros_o) + bias_o + residual_o),   sum_o = Σ weight * code over the window
//
// Codes are unsigned bytes, weights signed ones, sums int32. Zero padding pads with the code 0, not with the zero
// point: what the zero points of the input add, zeros_o = Σ weight * zero_point, is summed over those taps that are
// inside of the image. So zero points may have any value, also one that no code has.
//
// Where the readers of a value disagree on its quantizer (a layer reads 4 bits, the next residual sum 8), a second
// output spares them the value itself: it would be written once and read twice, in four times the bytes.
//
// Codes may be packed (ptq4cuda/ops/nibbles.py). Of a packed input each nibble is a channel, of codes up to 15, and
// the sums over the high nibbles, which lie behind low_bytes of low ones, count 16-fold.
#pragma once

#include <deque>

#include "ops.h"

namespace ptq4cuda {

constexpr int kPanelOutputs = 16;  // ptq4cuda/ops/panels.py says how weights are laid out
constexpr int kWordChannels = 4;
constexpr int kOctet = 8;           // channels whose nibbles are packed together
constexpr int64_t kSpanOfAll = -8;  // the span that holds for all codes and weights

struct Extent {
    int64_t height, width;

    PTQ_INLINE int64_t area() const { return height * width; }
};

// What is counted in 32 bits stays below: sizes of an image with its padding, of a kernel, of a panel.
constexpr int64_t kLimit = 1 << 30;
// The rows of an image, padded, that a row of outputs reads: what a CPU kernel copies, at least.
constexpr int64_t kWindowBytes = int64_t{1} << 31;
constexpr int64_t kOutputs = int64_t{1} << 60;  // of a result

inline Extent extent(const char* op, const char* name, Numbers pair, int64_t least) {
    STD_TORCH_CHECK(pair.size() == 2 && least <= std::min(pair[0], pair[1]) && std::max(pair[0], pair[1]) < kLimit,
                    op, ": ", name, " must be two numbers from ", least, " to ", kLimit - 1, ", got ", list_of(pair));
    return {pair[0], pair[1]};
}

// Images, and how the windows lie that convolutions and poolings compute outputs of.
struct Geometry {
    int64_t batch, channels;  // of the images
    Extent in, out, kernel, stride, padding, dilation;

    // Of the padded image, that so many rows of outputs are computed of.
    PTQ_INLINE int64_t rows_read(int64_t rows) const {
        return (rows - 1) * stride.height + dilation.height * (kernel.height - 1) + 1;
    }
};

struct ConvShape : Geometry {
    int64_t out_channels, groups;
    int64_t low_bytes;  // of a pixel of packed codes; 0: codes are bytes

    PTQ_INLINE int64_t group_channels() const { return channels / groups; }
    PTQ_INLINE int64_t group_outputs() const { return out_channels / groups; }
    PTQ_INLINE bool depthwise() const { return groups > 1 && channels == groups && out_channels == groups; }
    PTQ_INLINE int64_t panels_per_group() const { return ceil_div(group_outputs(), kPanelOutputs); }
    PTQ_INLINE int64_t words_per_tap() const { return ceil_div(group_channels(), kWordChannels); }
    PTQ_INLINE int64_t panel_words() const { return kernel.area() * words_per_tap(); }
    PTQ_INLINE int64_t pixels() const { return batch * out.area(); }
    PTQ_INLINE bool packed() const { return low_bytes > 0; }
    PTQ_INLINE int64_t pixel_bytes() const { return packed() ? channels / 2 : channels; }
    PTQ_INLINE int64_t high_bytes() const { return pixel_bytes() - low_bytes; }
    // Whether what is computed together are whole octets, so that outputs can be packed.
    bool whole_octets() const { return groups == 1 || (depthwise() ? channels : group_outputs()) % kOctet == 0; }
};

struct Activation {
    float negative_slope, upper;
};

// How the codes of an output lie in memory.
struct Packing {
    const int32_t* starts;  // the bytes of a pixel where the high nibbles of each octet begin, nullptr if not packed
    int32_t bytes;          // of a pixel

    // Where the high nibbles of an octet are, whatever `starts` holds: [begin, end).
    PTQ_INLINE int32_t begin(int64_t octet) const { return starts[octet] > 0 ? starts[octet] : 0; }
    PTQ_INLINE int32_t end(int64_t octet) const { return starts[octet + 1] < bytes ? starts[octet + 1] : bytes; }
};

struct ConvProblem {
    ConvShape shape;
    const uint8_t* x;          // [N, H, W, pixel_bytes()]
    const int8_t* weight;      // panels, or [R * S, C] if depthwise
    const int32_t* zero_sums;  // [R * S, O], or nullptr: all zero points are 0
    int64_t span;              // pairs of products that fit into 16 bits; negative: of nibbles of the codes
    const float *scale, *bias;
    Activation activation;
    const uint8_t* residual;  // [N, out H, out W, O], or nullptr
    QuantizerTable residual_quantizer;
    QuantizerTable out_quantizer;  // if the output is codes
    Packing out_packing;
    uint8_t* also;  // a second output, codes of the same values; or nullptr
    QuantizerTable also_quantizer;
    Packing also_packing;
};

// Reads how a window moves over images, into what has a kernel, stride, padding and dilation.
template <class Problem>
void set_window(const char* op, Numbers kernel_size, Numbers stride, Numbers padding, Numbers dilation, Problem& p) {
    p.kernel = extent(op, "kernel_size", kernel_size, 1);
    p.stride = extent(op, "stride", stride, 1);
    p.padding = extent(op, "padding", padding, 0);
    p.dilation = extent(op, "dilation", dilation, 1);
    if (p.kernel.height == 1) p.dilation.height = 1;
    if (p.kernel.width == 1) p.dilation.width = 1;
}

// The shape of a convolution of codes [N, C, H, W], x. Fails with a sentence.
inline ConvShape conv_shape(const char* op, Numbers x, int64_t out_channels, Numbers kernel_size, Numbers stride,
                            Numbers padding, Numbers dilation, int64_t groups, int64_t low_bytes) {
    ConvShape s;
    s.batch = x[0];
    s.in = {x[2], x[3]};
    set_window(op, kernel_size, stride, padding, dilation, s);
    s.out_channels = out_channels;
    STD_TORCH_CHECK(low_bytes == 0 || (0 < low_bytes && low_bytes <= x[1] && low_bytes % kWordChannels == 0 &&
                                       x[1] % kWordChannels == 0 && groups == 1),
                    op, ": x ", list_of(x), " with ", low_bytes, " low bytes and ", groups,
                    " groups holds no packed codes");
    STD_TORCH_CHECK(groups > 0 && x[1] > 0 && x[1] % groups == 0 && s.out_channels % groups == 0, op, ": ", x[1],
                    " input and ", s.out_channels, " output channels do not make ", groups, " groups");
    const auto too_large = [&](bool fits) {
        STD_TORCH_CHECK(fits, op, ": x ", list_of(x), " with the padding ", list_of(padding), ", the kernel ",
                        list_of(kernel_size), " with the dilation ", list_of(dilation), " or ", s.out_channels,
                        " outputs are too large");
    };
    too_large(std::max({x[1], s.in.height, s.in.width, s.out_channels}) < kLimit);
    s.low_bytes = low_bytes;
    s.channels = low_bytes ? 2 * x[1] : x[1];
    s.groups = groups;
    const Extent padded = {s.in.height + 2 * s.padding.height, s.in.width + 2 * s.padding.width};
    const Extent reach = {s.dilation.height * (s.kernel.height - 1) + 1, s.dilation.width * (s.kernel.width - 1) + 1};
    STD_TORCH_CHECK(padded.height >= reach.height && padded.width >= reach.width, op, ": the kernel ",
                    list_of(kernel_size), " is larger than the padded input ", list_of(x));
    s.out = {(padded.height - reach.height) / s.stride.height + 1, (padded.width - reach.width) / s.stride.width + 1};
    too_large(product_below(kLimit, {padded.height, padded.width}) &&
              product_below(kWindowBytes, {reach.height, padded.width, s.channels}) &&
              product_below(kLimit, {s.kernel.height, s.kernel.width, s.words_per_tap()}) &&
              product_below(kOutputs, {s.batch, s.out.height, s.out.width, s.out_channels}));
    return s;
}

// Lists of a schema that are None where they would be empty.
using TensorsOrNone = std::optional<std::vector<Tensor>>;
using NumbersOrNone = std::optional<std::vector<int64_t>>;

// The arguments of conv2d_integer, checked, and the outputs, allocated. The problem's first output is outputs[0].
struct ConvArguments {
    using Pair = std::vector<int64_t>;

    ConvProblem problem{};
    Tensor source;  // the input, channels_last
    std::vector<Tensor> outputs;

    ConvArguments(const Tensor& x, const Tensor& weight, std::optional<Tensor> zero_sums, const Tensor& scale,
                  const Tensor& bias, Pair kernel_size, Pair stride, Pair padding, Pair dilation, int64_t groups,
                  int64_t low_bytes, std::optional<int64_t> span, double negative_slope, std::optional<double> upper,
                  std::optional<Tensor> residual, std::optional<Tensor> residual_scale,
                  std::optional<Tensor> residual_zero_point, TensorsOrNone out_scale, TensorsOrNone out_zero_point,
                  TensorsOrNone out_bits, TensorsOrNone out_starts, NumbersOrNone out_bytes,
                  std::optional<int64_t> dtype) {
        const char* op = "conv2d_integer";
        ConvShape& shape = problem.shape;
        STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte && x.dim() == 4, op,
                        ": x must be a uint8 tensor [N, C, H, W], got ", described(x));
        shape = conv_shape(op, sizes_of(x), scale.numel(), kernel_size, stride, padding, dilation, groups, low_bytes);
        check_vector(op, "scale", scale, ScalarType::Float, shape.out_channels, x);
        check_vector(op, "bias", bias, ScalarType::Float, shape.out_channels, x);
        const std::vector<int64_t> weights =
            shape.depthwise() ? std::vector{shape.kernel.area(), shape.channels}
                              : std::vector<int64_t>{groups * shape.panels_per_group(), shape.panel_words(),
                                                     kPanelOutputs, kWordChannels};
        check_tensor(op, "weight", weight, ScalarType::Char, weights, x);
        if (zero_sums)
            check_tensor(op, "zero_sums", *zero_sums, ScalarType::Int, {shape.kernel.area(), shape.out_channels}, x);
        problem.span = span.value_or(kSpanOfAll);
        STD_TORCH_CHECK(problem.span != 0 && -kLimit <= problem.span && problem.span <= kLimit, op,
                        ": span must be 1 to ", kLimit, " or, of nibbles, negative, got ", problem.span);
        STD_TORCH_CHECK(std::isfinite(negative_slope), op, ": negative_slope must be finite, got ",
                        text_of(static_cast<float>(negative_slope)));
        STD_TORCH_CHECK(!std::isnan(upper.value_or(INFINITY)), op, ": upper must be a number, got nan");
        source = keep(channels_last(x));
        const Tensor &panels = keep(as_contiguous(weight)), &factors = keep(as_contiguous(scale));
        const Tensor& offsets = keep(as_contiguous(bias));

        if (residual) {
            check_tensor(op, "residual", *residual, ScalarType::Byte,
                         {shape.batch, shape.out_channels, shape.out.height, shape.out.width}, x);
            STD_TORCH_CHECK(residual_scale && residual_zero_point, op,
                            ": residual needs residual_scale and residual_zero_point");
            problem.residual = keep(channels_last(*residual)).const_data_ptr<uint8_t>();
            added_.emplace(op, x, *residual_scale, *residual_zero_point, std::nullopt, shape.out_channels);
            problem.residual_quantizer = added_->table();
        }
        const std::vector<Tensor> scales = out_scale.value_or(std::vector<Tensor>{}),
                                  zero_points = out_zero_point.value_or(std::vector<Tensor>{}),
                                  widths = out_bits.value_or(std::vector<Tensor>{}),
                                  all_starts = out_starts.value_or(std::vector<Tensor>{});
        const std::vector<int64_t> packed_bytes = out_bytes.value_or(std::vector<int64_t>{});
        const size_t codes = scales.size();
        STD_TORCH_CHECK(zero_points.size() == codes && widths.size() == codes && all_starts.size() == codes &&
                            packed_bytes.size() == codes,
                        op,
                        ": out_scale, out_zero_point, out_bits, out_starts and out_bytes must have an item for each ",
                        "output of codes, got ", codes, ", ", zero_points.size(), ", ", widths.size(), ", ",
                        all_starts.size(), " and ", packed_bytes.size());
        STD_TORCH_CHECK(0 < codes + dtype.has_value() && codes + dtype.has_value() <= 2, op,
                        ": there are one or two outputs, got ", codes + dtype.has_value());
        std::optional<ScalarType> values;
        if (dtype) values = floating_type(op, *dtype);
        const auto packing = [&](size_t i) {
            const Tensor& starts = all_starts[i];
            if (starts.numel() == 0) return Packing{};
            const int64_t octets = ceil_div(shape.out_channels, kOctet), bytes = packed_bytes[i];
            const std::string name = "out_starts[" + std::to_string(i) + "]";
            check_vector(op, name.c_str(), starts, ScalarType::Int, octets + 1, x);
            STD_TORCH_CHECK(bytes >= octets * kWordChannels && bytes % kWordChannels == 0 && bytes < kLimit &&
                                shape.whole_octets(),
                            op, ": ", shape.out_channels, " outputs in ", groups, " groups are not packed in ", bytes,
                            " bytes");
            const Packing packed{keep(as_contiguous(starts)).const_data_ptr<int32_t>(), static_cast<int32_t>(bytes)};
            STD_TORCH_CHECK(!is_readable(x) || fits(packed, quantizers_[i].table(), shape.out_channels), op, ": ",
                            name, " are not those of out_bits[", i, "] in ", bytes, " bytes");
            return packed;
        };
        const auto add_output = [&](ScalarType type, const Packing& packed) {
            const int64_t channels = packed.starts ? packed.bytes : shape.out_channels, width = shape.out.width;
            const std::vector<int64_t> size = {shape.batch, channels, shape.out.height, width};
            const std::vector<int64_t> strides = {shape.out.height * width * channels, 1, width * channels, channels};
            outputs.push_back(empty_strided(size, strides, type, x));
        };
        if (values) add_output(*values, Packing{});
        for (size_t i = 0; i < codes; ++i) {
            quantizers_.emplace_back(op, x, scales[i], zero_points[i], widths[i], shape.out_channels);
            const Packing packed = packing(i);
            add_output(ScalarType::Byte, packed);
            if (outputs.size() == 1) {
                problem.out_quantizer = quantizers_[i].table();
                problem.out_packing = packed;
            } else {
                problem.also = outputs[1].mutable_data_ptr<uint8_t>();
                problem.also_quantizer = quantizers_[i].table();
                problem.also_packing = packed;
            }
        }
        problem.x = source.const_data_ptr<uint8_t>();
        problem.weight = panels.const_data_ptr<int8_t>();
        if (zero_sums) problem.zero_sums = keep(as_contiguous(*zero_sums)).const_data_ptr<int32_t>();
        problem.scale = factors.const_data_ptr<float>();
        problem.bias = offsets.const_data_ptr<float>();
        problem.activation = {static_cast<float>(negative_slope), static_cast<float>(upper.value_or(INFINITY))};
    }

private:
    const Tensor& keep(Tensor t) { return kept_.emplace_back(std::move(t)); }

    static Tensor channels_last(const Tensor& t) {
        return is_channels_last(t) ? t : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
    }

    static void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                             const std::vector<int64_t>& sizes, const Tensor& x) {
        STD_TORCH_CHECK(t.scalar_type() == dtype && list_of(sizes) == shape_of(t), op, ": ", name, " must be ",
                        name_of(dtype), " ", list_of(sizes), ", got ", described(t));
        check_same_device(op, name, t, x);
    }

    // Whether the starts are those of the quantizer's bits: each octet has the bytes that its high nibbles need.
    static bool fits(const Packing& packed, const QuantizerTable& quantizer, int64_t outputs) {
        int64_t begin = ceil_div(outputs, kOctet) * kWordChannels;
        for (int64_t o = 0, high = 0; o < outputs; ++o) {
            if (o % kOctet == 0 && packed.starts[o / kOctet] != begin) return false;
            high += quantizer.bits[o * quantizer.bits_stride] > 4;
            if (o % kOctet < kOctet - 1 && o + 1 < outputs) continue;
            begin += ceil_div(high, 2);
            high = 0;
        }
        return begin <= packed.bytes && packed.starts[ceil_div(outputs, kOctet)] == packed.bytes;
    }

    std::deque<Tensor> kept_;  // what the problem points into
    std::vector<QuantizerArguments> quantizers_;
    std::optional<QuantizerArguments> added_;
};

// The backend's
//     template <class T>
//     static void conv(const Tensor& x, const ConvProblem&, T* y)
// fills y [N, out H, out W, O], which is not empty.
template <class Backend>
struct ConvOps {
    using Pair = std::vector<int64_t>;

    static std::vector<Tensor> conv2d_integer(
        const Tensor& x, const Tensor& weight, std::optional<Tensor> zero_sums, const Tensor& scale,
        const Tensor& bias, Pair kernel_size, Pair stride, Pair padding, Pair dilation, int64_t groups,
        int64_t low_bytes, std::optional<int64_t> span, double negative_slope, std::optional<double> upper,
        std::optional<Tensor> residual, std::optional<Tensor> residual_scale,
        std::optional<Tensor> residual_zero_point, TensorsOrNone out_scale, TensorsOrNone out_zero_point,
        TensorsOrNone out_bits, TensorsOrNone out_starts, NumbersOrNone out_bytes, std::optional<int64_t> dtype) {
        const ConvArguments arguments(x, weight, zero_sums, scale, bias, kernel_size, stride, padding, dilation,
                                      groups, low_bytes, span, negative_slope, upper, residual, residual_scale,
                                      residual_zero_point, out_scale, out_zero_point, out_bits, out_starts, out_bytes,
                                      dtype);
        const Tensor& y = arguments.outputs[0];
        if (y.numel() == 0) return arguments.outputs;
        if (!dtype) {
            Backend::conv(arguments.source, arguments.problem, y.mutable_data_ptr<uint8_t>());
        } else {
            dispatch_floating(y.scalar_type(), [&](auto type) {
                Backend::conv(arguments.source, arguments.problem, static_cast<decltype(type)*>(y.data_ptr()));
            });
        }
        return arguments.outputs;
    }
};

}  // namespace ptq4cuda
