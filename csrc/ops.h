// What the entry points and the kernels of all backends share: argument checks, the view of a tensor as
// [outer, channels, inner], tables of parameters, allocation. ptq4cuda/ops checks arguments first and raises
// ValueError or TypeError; the checks here keep a direct torch.ops call from touching memory it does not own.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "numerics.h"

namespace ptq4cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline std::string shape_of(const Tensor& t) {
    std::string s = "[";
    for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
    return s + "]";
}

inline bool is_floating(ScalarType t) {
    return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// Dimensions from outermost to innermost in memory.
inline std::vector<int64_t> memory_order(const Tensor& t) {
    std::vector<int64_t> order(t.dim());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
    return order;
}

// True if the elements fill one block of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
    if (t.is_contiguous()) return true;
    int64_t expected = 1;
    const auto order = memory_order(t);
    for (auto d = order.rbegin(); d != order.rend(); ++d) {
        if (t.size(*d) == 1) continue;
        if (t.stride(*d) != expected) return false;
        expected *= t.size(*d);
    }
    return true;
}

// The tensor itself, or a contiguous copy. (Asking torch for it costs microseconds, even where nothing is copied.)
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The tensor itself, or a dense copy with the strides that torch.empty_like would choose.
inline Tensor dense(const Tensor& t) { return is_dense(t) ? t : torch::stable::clone(t); }

inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype, const Tensor& like) {
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                                 like.get_device_index(), &handle));
    return Tensor(handle);
}

inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
    return empty_strided(t.sizes(), t.strides(), dtype, t);
}

inline Tensor empty_vector(int64_t length, ScalarType dtype, const Tensor& like) {
    const int64_t stride = 1;
    return empty_strided({&length, 1}, {&stride, 1}, dtype, like);
}

inline int64_t normalized_axis(const char* op, const Tensor& x, int64_t axis) {
    const int64_t dims = std::max<int64_t>(x.dim(), 1);
    STD_TORCH_CHECK(-dims <= axis && axis < dims, op, ": axis ", axis, " is out of range for shape ", shape_of(x));
    return axis < 0 ? axis + dims : axis;
}

// A dense tensor seen in memory order as [outer, channels, inner]; the axis of the channels is in the middle.
// Contiguous NCHW: outer N, inner H*W. Channels_last: outer N*H*W, inner 1.
struct ChannelLayout {
    int64_t outer = 1;
    int64_t channels = 1;
    int64_t inner = 1;

    int64_t numel() const { return outer * channels * inner; }
    int64_t per_channel() const { return outer * inner; }
};

inline ChannelLayout channel_layout(const Tensor& t, int64_t axis) {
    ChannelLayout layout;
    bool before = true;
    if (t.dim() == 0) return layout;
    for (int64_t d : memory_order(t)) {
        if (d == axis) {
            layout.channels = t.size(d);
            before = false;
        } else {
            (before ? layout.outer : layout.inner) *= t.size(d);
        }
    }
    return layout;
}

inline void check_input(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(is_floating(x.scalar_type()), op, ": x must be float32, float16 or bfloat16");
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
    STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), op, ": ", name,
                    " is on another device than the input");
}

inline void check_parameter(const char* op, const char* name, const Tensor& p, ScalarType dtype, int64_t channels,
                            const Tensor& x) {
    STD_TORCH_CHECK(p.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
    STD_TORCH_CHECK(p.dim() == 1 && (p.size(0) == channels || p.size(0) == 1), op, ": ", name, " has shape ",
                    shape_of(p), ", expected [", channels, "] or [1]");
    check_same_device(op, name, p, x);
}

// The per-channel parameters of a quantizer as raw pointers. A vector of length 1 serves every channel:
// stride 0.
struct QuantizerTable {
    const float* scale;
    const int32_t* zero_point;
    const uint8_t* bits;  // nullptr: 4 bits everywhere
    int64_t scale_stride, zero_point_stride, bits_stride;

    PTQ_INLINE Quantizer operator[](int64_t c) const {
        return make_quantizer(scale[c * scale_stride], zero_point[c * zero_point_stride],
                              bits ? bits[c * bits_stride] : uint8_t{4});
    }
    bool per_tensor() const { return scale_stride == 0 && zero_point_stride == 0 && bits_stride == 0; }
};

// Owns contiguous parameter tensors for as long as a table points into them.
struct QuantizerArguments {
    Tensor scale, zero_point;
    std::optional<Tensor> bits;

    QuantizerArguments(const char* op, const Tensor& x, const Tensor& scale_, const Tensor& zero_point_,
                       const std::optional<Tensor>& bits_, int64_t channels)
        : scale(as_contiguous(scale_)), zero_point(as_contiguous(zero_point_)) {
        check_parameter(op, "scale", scale, ScalarType::Float, channels, x);
        check_parameter(op, "zero_point", zero_point, ScalarType::Int, channels, x);
        if (bits_) {
            check_parameter(op, "bits", *bits_, ScalarType::Byte, channels, x);
            bits = as_contiguous(*bits_);
        }
    }
    QuantizerTable table() const {
        return {scale.const_data_ptr<float>(),
                zero_point.const_data_ptr<int32_t>(),
                bits ? bits->const_data_ptr<uint8_t>() : nullptr,
                scale.size(0) > 1,
                zero_point.size(0) > 1,
                bits && bits->size(0) > 1};
    }
};

// The bins of each channel as raw pointers; a limit of length 1 serves every channel: stride 0.
struct BinTable {
    const float *low, *high;
    int64_t low_stride, high_stride, bins;

    PTQ_INLINE Binning operator[](int64_t c) const {
        return make_binning(low[c * low_stride], high[c * high_stride], bins);
    }
};

// Owns contiguous limits for as long as a table points into them.
struct BinArguments {
    Tensor low, high;

    BinArguments(const char* op, const Tensor& x, const Tensor& low_, const Tensor& high_, int64_t channels)
        : low(torch::stable::contiguous(low_)), high(torch::stable::contiguous(high_)) {
        check_parameter(op, "low", low, ScalarType::Float, channels, x);
        check_parameter(op, "high", high, ScalarType::Float, channels, x);
    }
    BinTable table(int64_t bins) const {
        return {low.const_data_ptr<float>(), high.const_data_ptr<float>(), low.size(0) > 1, high.size(0) > 1, bins};
    }
};

// An out= argument must have the shape, dtype, device and memory order of what the op would return.
inline void check_out(const char* op, const Tensor& out, const Tensor& like, ScalarType dtype) {
    STD_TORCH_CHECK(out.scalar_type() == dtype, op, ": out has the wrong dtype");
    check_same_device(op, "out", out, like);
    bool same = out.dim() == like.dim();
    for (int64_t d = 0; same && d < out.dim(); ++d) {
        same = out.size(d) == like.size(d) && (out.stride(d) == like.stride(d) || out.size(d) == 1);
    }
    STD_TORCH_CHECK(same || (out.numel() == 0 && shape_of(out) == shape_of(like)), op, ": out has shape ",
                    shape_of(out), " or strides that differ from the input's ", shape_of(like));
}

// --- packed 4-bit tensors: [N, C, *spatial] <-> uint8 [N, *spatial, ceil(C / 2)]
// -------------------------------

// The shape of an unpacked tensor [N, C, *spatial] as three numbers, and the order that its memory has.
struct PackLayout {
    int64_t batch, channels, spatial;
    bool channels_last;  // [N, spatial, C] in memory, else [N, C, spatial]

    int64_t packed_channels() const { return (channels + 1) / 2; }
    // Channel layout of the unpacked tensor in memory, for quantizers along dimension `axis` (0 or 1).
    ChannelLayout rows(int64_t axis) const {
        if (axis == 0) return {1, batch, channels * spatial};
        return channels_last ? ChannelLayout{batch * spatial, channels, 1} : ChannelLayout{batch, channels, spatial};
    }
};

inline bool is_channels_last(const Tensor& x) {
    int64_t expected = 1;
    const auto fits = [&](int64_t d) {
        const bool ok = x.size(d) == 1 || x.stride(d) == expected;
        expected *= x.size(d);
        return ok;
    };
    if (!fits(1)) return false;
    for (int64_t d = x.dim() - 1; d >= 2; --d)
        if (!fits(d)) return false;
    return fits(0);
}

inline PackLayout pack_layout(const Tensor& x) {
    int64_t spatial = 1;
    for (int64_t d = 2; d < x.dim(); ++d) spatial *= x.size(d);
    return {x.size(0), x.size(1), spatial, is_channels_last(x)};
}

inline int64_t pack_axis(const char* op, int64_t dims, int64_t axis) {
    STD_TORCH_CHECK(dims >= 2, op, ": needs a tensor of shape [N, C, ...], got ", dims, " dimension(s)");
    const int64_t normalized = axis < 0 ? axis + dims : axis;
    STD_TORCH_CHECK(normalized == 0 || normalized == 1, op, ": axis must be 0 or 1, got ", axis);
    return normalized;
}

inline std::vector<int64_t> packed_sizes(const Tensor& x) {
    std::vector<int64_t> sizes = {x.size(0)};
    for (int64_t d = 2; d < x.dim(); ++d) sizes.push_back(x.size(d));
    sizes.push_back((x.size(1) + 1) / 2);
    return sizes;
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
    return strides;
}

inline void check_packed(const char* op, const Tensor& packed, const std::vector<int64_t>& sizes) {
    bool same = packed.dim() == static_cast<int64_t>(sizes.size()) && packed.is_contiguous();
    for (size_t d = 0; same && d < sizes.size(); ++d) same = packed.size(d) == sizes[d];
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && same, op,
                    ": the packed tensor must be contiguous uint8 [N, *spatial, ceil(C / 2)], got ",
                    shape_of(packed));
}

inline Tensor empty_packed(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 2, op, ": needs a tensor of shape [N, C, ...], got ", shape_of(x));
    const auto sizes = packed_sizes(x);
    return empty_strided(sizes, contiguous_strides(sizes), ScalarType::Byte, x);
}

// [N, C, *spatial] with the memory order of the packed tensor: channels innermost.
inline Tensor empty_unpacked(const char* op, const Tensor& packed, int64_t channels, ScalarType dtype) {
    STD_TORCH_CHECK(packed.dim() >= 2 && channels >= 0 && (channels + 1) / 2 == packed.size(packed.dim() - 1), op,
                    ": ", channels, " channels do not fit the packed shape ", shape_of(packed));
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < packed.dim() - 1; ++d) sizes.push_back(packed.size(d));
    sizes.push_back(channels);
    auto strides = contiguous_strides(sizes);
    std::rotate(sizes.begin() + 1, sizes.end() - 1, sizes.end());
    std::rotate(strides.begin() + 1, strides.end() - 1, strides.end());
    return empty_strided(sizes, strides, dtype, packed);
}

// --- rows of codes of any bit-width
// ----------------------------------------------------------------------------

// Row r holds `length` codes of bits[r] bits from byte offsets[r] on.
struct RowTable {
    const uint8_t* bits;
    const int64_t* offsets;
    int64_t rows, length, packed_bytes;

    // Whether row r lies inside the packed buffer.
    PTQ_INLINE bool holds(int64_t r) const {
        const int64_t bytes = (length * bits[r] + 7) / 8;
        return bits[r] <= 8 && offsets[r] >= 0 && bytes <= packed_bytes && offsets[r] <= packed_bytes - bytes;
    }
};

// Owns contiguous tensors for as long as a table points into them.
struct RowArguments {
    Tensor bits, offsets;

    RowArguments(const char* op, const Tensor& x, const Tensor& bits_, const Tensor& offsets_, int64_t rows)
        : bits(torch::stable::contiguous(bits_)), offsets(torch::stable::contiguous(offsets_)) {
        STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.dim() == 1 && bits.size(0) == rows, op,
                        ": bits must be uint8 [", rows, "], its shape is ", shape_of(bits));
        STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.size(0) == rows,
                        op, ": offsets must be int64 [", rows, "], its shape is ", shape_of(offsets));
        check_same_device(op, "bits", bits, x);
        check_same_device(op, "offsets", offsets, x);
    }
    RowTable table(int64_t length, int64_t packed_bytes) const {
        return {bits.const_data_ptr<uint8_t>(), offsets.const_data_ptr<int64_t>(), bits.size(0), length,
                packed_bytes};
    }
};

// Columns of the result of channel_statistics.
enum { kCount, kMin, kMax, kMean, kM2, kAbsDev, kPositive, kStatistics };

constexpr int64_t kMaximumBins = 4096;  // of channel_histogram

// Calls f with a value of the C++ type of a floating dtype.
template <class F>
void dispatch_floating(ScalarType dtype, F&& f) {
    switch (dtype) {
        case ScalarType::Float: return f(float{});
        case ScalarType::Half: return f(torch::headeronly::Half{});
        default: return f(torch::headeronly::BFloat16{});
    }
}

}  // namespace ptq4cuda
