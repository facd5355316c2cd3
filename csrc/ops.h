// What the entry points and the kernels of all backends share: argument checks, the view of a tensor as
// [outer, channels, inner], tables of parameters, allocation. The checks say, sentence by sentence, what
// ptq4cuda/ops/checks.py says for the reference and the fake kernels. Values of parameters are looked at where they
// lie on the CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cctype>
#include <cfloat>
#include <cstdio>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "numerics.h"

namespace ptq4cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- what an error says --------------------------------------------------------------------------------------------

using Numbers = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string list_of(Numbers numbers) {
    std::string s = "[";
    for (size_t i = 0; i < numbers.size(); ++i) s += (i ? ", " : "") + std::to_string(numbers[i]);
    return s + "]";
}
inline std::string shape_of(const Tensor& t) { return list_of(t.sizes()); }
inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline std::string name_of(ScalarType t) {
    switch (t) {
        case ScalarType::Byte: return "torch.uint8";
        case ScalarType::Char: return "torch.int8";
        case ScalarType::Short: return "torch.int16";
        case ScalarType::Int: return "torch.int32";
        case ScalarType::Long: return "torch.int64";
        case ScalarType::Half: return "torch.float16";
        case ScalarType::Float: return "torch.float32";
        case ScalarType::Double: return "torch.float64";
        case ScalarType::ComplexHalf: return "torch.complex32";
        case ScalarType::ComplexFloat: return "torch.complex64";
        case ScalarType::ComplexDouble: return "torch.complex128";
        default: break;
    }
    std::string name = torch::headeronly::toString(t);
    for (char& c : name) c = static_cast<char>(std::tolower(c));
    return "torch." + name;
}
inline std::string described(const Tensor& t) { return name_of(t.scalar_type()) + " " + shape_of(t); }

inline std::string device_of(const Tensor& t) {
    return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

inline std::string text_of(float value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return value == value ? text : "nan";
}

// --- tensors in memory ---------------------------------------------------------------------------------------------

inline bool is_floating(ScalarType t) {
    return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// The type that an operator's argument dtype is the number of: a schema's int, see ptq4cuda/ops/schemas.py.
inline ScalarType floating_type(const char* op, int64_t number) {
    const bool known = 0 <= number && number <= static_cast<int64_t>(ScalarType::BFloat16);
    const auto type = static_cast<ScalarType>(known ? number : 0);
    STD_TORCH_CHECK(is_floating(type), op, ": dtype must be float32, float16 or bfloat16, got ",
                    known ? name_of(type) : std::to_string(number));
    return type;
}

// Whether a product of sizes, none of which is negative, is less than a limit.
inline bool product_below(int64_t limit, std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return limit > 0;
    for (int64_t size : sizes)
        if (__builtin_mul_overflow(product, size, &product) || product >= limit) return false;
    return true;
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
    if (t.numel() == 0) return false;
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
    STD_TORCH_CHECK(-dims <= axis && axis < dims, op, ": axis ", axis, " is out of range for x of shape ",
                    shape_of(x));
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
    if (t.numel() == 0) return {0, t.size(axis), 1};
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

// --- checks --------------------------------------------------------------------------------------------------------

inline void check_input(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(is_floating(x.scalar_type()), op, ": x must be a float32, float16 or bfloat16 tensor, got ",
                    described(x));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
    STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), op, ": ", name,
                    " is on ", device_of(t), ", the tensor it belongs to on ", device_of(x));
}

inline void check_dtype(const char* op, const char* name, const Tensor& p, ScalarType dtype) {
    STD_TORCH_CHECK(p.scalar_type() == dtype, op, ": ", name, " must be ", name_of(dtype), ", got ",
                    name_of(p.scalar_type()));
}

// A vector of this length, or, for parameters of channels, of length 1.
inline void check_vector(const char* op, const char* name, const Tensor& p, ScalarType dtype, int64_t length,
                         const Tensor& x, bool or_one = false) {
    check_dtype(op, name, p, dtype);
    STD_TORCH_CHECK(p.dim() == 1 && (p.size(0) == length || (or_one && p.size(0) == 1)), op, ": ", name,
                    " must have the shape [", length, or_one && length != 1 ? "] or [1], got " : "], got ",
                    shape_of(p));
    check_same_device(op, name, p, x);
}

// Whether the values of a tensor can be looked at without waiting. What the execution model of CUDA takes for memory
// of a device cannot.
inline bool is_readable(const Tensor& t) {
#if defined(PTQ4CUDA_ON_CPU)
    return false;
#else
    return t.is_cpu();
#endif
}

// The limits of what the arithmetic of numerics.h holds exactly.
constexpr int64_t kMaximumZeroPoint = 1 << 22;
constexpr uint8_t kMaximumBits = 8;

inline void check_scales(const char* op, const float* scale, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        STD_TORCH_CHECK(FLT_MIN <= scale[i] && scale[i] <= FLT_MAX, op,
                        ": scale must be positive and finite (at least ", text_of(FLT_MIN), "), scale[", i, "] is ",
                        text_of(scale[i]));
}
inline void check_zero_points(const char* op, const int32_t* zero_point, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        STD_TORCH_CHECK(-kMaximumZeroPoint <= zero_point[i] && zero_point[i] <= kMaximumZeroPoint, op,
                        ": zero_point must be from ", -kMaximumZeroPoint, " to ", kMaximumZeroPoint, ", got ",
                        zero_point[i]);
}
inline void check_bits(const char* op, const uint8_t* bits, int64_t count) {
    const int largest = count ? *std::max_element(bits, bits + count) : 0;
    STD_TORCH_CHECK(largest <= kMaximumBits, op, ": bits must be 0 to 8, got ", largest);
}

// The bytes from a tensor's first element to behind its last one.
struct MemoryRange {
    const char *begin, *end;

    explicit MemoryRange(const Tensor& t) : begin(static_cast<const char*>(t.data_ptr())), end(begin) {
        if (t.numel() == 0) return;
        int64_t last = 0;
        for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
        end += (last + 1) * t.element_size();
    }
};

inline bool same_layout(const Tensor& a, const Tensor& b) {
    bool same = a.dim() == b.dim();
    for (int64_t d = 0; same && d < a.dim(); ++d)
        same = a.size(d) == b.size(d) && (a.stride(d) == b.stride(d) || a.size(d) == 1);
    return same;
}

// out must not have memory of an input. Where the op can work in place, it may be the input itself.
inline void check_apart(const char* op, const Tensor& out, const char* name, const Tensor& t, bool in_place = false) {
    const MemoryRange a(out), b(t);
    if (a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin) return;
    if (in_place && a.begin == b.begin && out.scalar_type() == t.scalar_type() && same_layout(out, t)) return;
    STD_TORCH_CHECK(false, op, ": out overlaps ", name, " in memory",
                    in_place ? " without being the same tensor" : "");
}

// out must be what the op would return.
inline void check_out(const char* op, const Tensor& out, ScalarType dtype, const std::vector<int64_t>& sizes,
                      const std::vector<int64_t>& strides, const Tensor& x) {
    const bool same_shape = std::equal(sizes.begin(), sizes.end(), out.sizes().begin(), out.sizes().end());
    STD_TORCH_CHECK(out.scalar_type() == dtype && same_shape && device_of(out) == device_of(x), op, ": out must be ",
                    name_of(dtype), " ", list_of(sizes), " on ", device_of(x), ", got ", described(out), " on ",
                    device_of(out));
    bool same = true;
    for (int64_t d = 0; d < out.dim(); ++d) same &= out.stride(d) == strides[d] || out.size(d) == 1;
    STD_TORCH_CHECK(same || out.numel() == 0, op, ": out must have the strides ", list_of(strides), ", it has ",
                    list_of(out.strides()));
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
    // That of one channel, for all.
    QuantizerTable at(int64_t c) const {
        return {scale + c * scale_stride,
                zero_point + c * zero_point_stride,
                bits ? bits + c * bits_stride : nullptr,
                0,
                0,
                0};
    }
    bool per_tensor() const { return scale_stride == 0 && zero_point_stride == 0 && bits_stride == 0; }
};

// Owns contiguous parameter tensors for as long as a table points into them.
struct QuantizerArguments {
    Tensor scale, zero_point;
    std::optional<Tensor> bits;

    QuantizerArguments(const char* op, const Tensor& x, const Tensor& scale_, const Tensor& zero_point_,
                       const std::optional<Tensor>& bits_, int64_t channels)
        : scale(scale_), zero_point(zero_point_), bits(bits_) {
        check_vector(op, "scale", scale, ScalarType::Float, channels, x, true);
        check_vector(op, "zero_point", zero_point, ScalarType::Int, channels, x, true);
        if (bits) check_vector(op, "bits", *bits, ScalarType::Byte, channels, x, true);
        scale = as_contiguous(scale);
        zero_point = as_contiguous(zero_point);
        if (bits) bits = as_contiguous(*bits);
        if (!is_readable(scale)) return;
        check_scales(op, scale.const_data_ptr<float>(), scale.size(0));
        check_zero_points(op, zero_point.const_data_ptr<int32_t>(), zero_point.size(0));
        if (bits) check_bits(op, bits->const_data_ptr<uint8_t>(), bits->size(0));
    }
    void check_apart_from(const char* op, const Tensor& out) const {
        check_apart(op, out, "scale", scale);
        check_apart(op, out, "zero_point", zero_point);
        if (bits) check_apart(op, out, "bits", *bits);
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
        : low(low_), high(high_) {
        check_vector(op, "low", low, ScalarType::Float, channels, x, true);
        check_vector(op, "high", high, ScalarType::Float, channels, x, true);
        low = as_contiguous(low);
        high = as_contiguous(high);
    }
    BinTable table(int64_t bins) const {
        return {low.const_data_ptr<float>(), high.const_data_ptr<float>(), low.size(0) > 1, high.size(0) > 1, bins};
    }
};

// --- packed 4-bit tensors: [N, C, *spatial] <-> uint8 [N, *spatial, ceil(C / 2)] -----------------------------------

// Bytes of so many 4-bit codes. (No size of a tensor makes it overflow.)
inline int64_t pairs(int64_t codes) { return codes / 2 + codes % 2; }

// The shape of an unpacked tensor [N, C, *spatial] as three numbers, and the order that its memory has.
struct PackLayout {
    int64_t batch, channels, spatial;
    bool channels_last;  // [N, spatial, C] in memory, else [N, C, spatial]

    int64_t packed_channels() const { return pairs(channels); }
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
    const int64_t normalized = axis < 0 ? axis + dims : axis;
    STD_TORCH_CHECK(normalized == 0 || normalized == 1, op, ": axis must be 0 or 1, got ", axis);
    return normalized;
}

inline std::vector<int64_t> packed_sizes(const Tensor& x) {
    std::vector<int64_t> sizes = {x.size(0)};
    for (int64_t d = 2; d < x.dim(); ++d) sizes.push_back(x.size(d));
    sizes.push_back(pairs(x.size(1)));
    return sizes;
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
    return strides;
}

// A packed tensor that is read: uint8 [N, *spatial, ceil(C / 2)].
inline void check_packed(const char* op, const Tensor& packed) {
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() >= 2, op,
                    ": packed must be a uint8 tensor [N, *spatial, ceil(C / 2)], got ", described(packed));
}

// [N, C, *spatial] with the memory order of the packed tensor: channels innermost.
inline Tensor empty_unpacked(const Tensor& packed, int64_t channels, ScalarType dtype) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < packed.dim() - 1; ++d) sizes.push_back(packed.size(d));
    sizes.push_back(channels);
    auto strides = contiguous_strides(sizes);
    std::rotate(sizes.begin() + 1, sizes.end() - 1, sizes.end());
    std::rotate(strides.begin() + 1, strides.end() - 1, strides.end());
    return empty_strided(sizes, strides, dtype, packed);
}

// --- rows of codes of any bit-width --------------------------------------------------------------------------------

// Row r holds `length` codes of bits[r] bits from byte offsets[r] on.
struct RowTable {
    const uint8_t* bits;
    const int64_t* offsets;
    int64_t rows, length, packed_bytes;

    // The bytes of a row. (No length of a tensor makes it overflow.)
    PTQ_INLINE int64_t bytes(int64_t r) const { return length / 8 * bits[r] + (length % 8 * bits[r] + 7) / 8; }
    // Whether row r lies inside the packed buffer.
    PTQ_INLINE bool holds(int64_t r) const {
        return bits[r] <= 8 && offsets[r] >= 0 && bytes(r) <= packed_bytes && offsets[r] <= packed_bytes - bytes(r);
    }
};

// Owns contiguous tensors for as long as a table points into them.
struct RowArguments {
    Tensor bits, offsets;

    RowArguments(const char* op, const Tensor& x, const Tensor& bits_, const Tensor& offsets_, int64_t rows)
        : bits(bits_), offsets(offsets_) {
        check_vector(op, "bits", bits, ScalarType::Byte, rows, x);
        check_vector(op, "offsets", offsets, ScalarType::Long, rows, x);
        bits = as_contiguous(bits);
        offsets = as_contiguous(offsets);
    }
    // The table, whose values are checked if they can be read: rows must lie inside of the packed buffer, and, to be
    // written, apart from each other.
    RowTable table(const char* op, int64_t length, int64_t packed_bytes, bool written) const {
        const RowTable t = {bits.const_data_ptr<uint8_t>(), offsets.const_data_ptr<int64_t>(), bits.size(0), length,
                            packed_bytes};
        if (!is_readable(bits)) return t;
        check_bits(op, t.bits, t.rows);
        for (int64_t r = 0; r < t.rows; ++r)
            STD_TORCH_CHECK(t.holds(r), op, ": row ", r, " of ", length, " codes of ", static_cast<int>(t.bits[r]),
                            " bits at byte ", t.offsets[r], " does not fit into ", packed_bytes, " bytes");
        if (written) check_rows_apart(op, t);
        return t;
    }
    void check_apart_from(const char* op, const Tensor& out) const {
        check_apart(op, out, "bits", bits);
        check_apart(op, out, "offsets", offsets);
    }

private:
    static void check_rows_apart(const char* op, const RowTable& t) {
        std::vector<int64_t> order;
        for (int64_t r = 0; r < t.rows; ++r)
            if (t.bytes(r) > 0) order.push_back(r);
        const auto earlier = [&](int64_t a, int64_t b) { return t.offsets[a] < t.offsets[b]; };
        if (!std::is_sorted(order.begin(), order.end(), earlier)) std::sort(order.begin(), order.end(), earlier);
        for (size_t i = 1; i < order.size(); ++i)
            STD_TORCH_CHECK(t.offsets[order[i - 1]] + t.bytes(order[i - 1]) <= t.offsets[order[i]], op,
                            ": rows overlap at byte ", t.offsets[order[i]]);
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
