// What an op does before its kernel runs, the same for every backend: check the arguments, copy what is not
// dense, allocate the result, dispatch on the dtype. A backend supplies the kernels as static members; the
// two backends accept, refuse and return exactly the same because both come through here.
#pragma once

#include "ops.h"

namespace ptq4cuda {

// fake_quantize and quantize. The backend's
//     template <class Op, class T, class Out>
//     static void elementwise(const Tensor& x, const Tensor& y, const ChannelLayout&, const QuantizerTable&)
// applies Op (FakeQuantize or Quantize) to dense tensors of equal strides and at least one element.
template <class Backend>
struct QuantizeOps {
    static Tensor fake_quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& bits,
                                int64_t axis) {
        return returned("fake_quantize", x, scale, zero_point, bits, axis, x.scalar_type());
    }
    static void fake_quantize_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& bits,
                                  int64_t axis, const Tensor& out) {
        into("fake_quantize", x, scale, zero_point, bits, axis, x.scalar_type(), out);
    }
    static Tensor quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& bits,
                           int64_t axis) {
        return returned("quantize", x, scale, zero_point, bits, axis, ScalarType::Byte);
    }
    static void quantize_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& bits,
                             int64_t axis, const Tensor& out) {
        into("quantize", x, scale, zero_point, bits, axis, ScalarType::Byte, out);
    }

private:
    static Tensor returned(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                           const Tensor& bits, int64_t axis, ScalarType dtype) {
        const Problem problem(op, x, scale, zero_point, bits, axis);
        Tensor y = empty_like(problem.source, dtype);
        problem.fill(y);
        return y;
    }

    static void into(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                     const Tensor& bits, int64_t axis, ScalarType dtype, const Tensor& out) {
        const Problem problem(op, x, scale, zero_point, bits, axis);
        const auto sizes = problem.source.sizes(), strides = problem.source.strides();
        check_out(op, out, dtype, {sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, x);
        check_apart(op, out, "x", x, true);
        problem.arguments.check_apart_from(op, out);
        problem.fill(out);
    }

    static Tensor dense_input(const char* op, const Tensor& x) {
        check_input(op, x);
        return dense(x);
    }

    // Checked arguments.
    struct Problem {
        Tensor source;  // dense
        ChannelLayout layout;
        QuantizerArguments arguments;

        Problem(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& bits,
                int64_t axis)
            : source(dense_input(op, x)),
              layout(channel_layout(source, normalized_axis(op, x, axis))),
              arguments(op, x, scale, zero_point, bits, layout.channels) {}

        void fill(const Tensor& y) const {
            if (source.numel() == 0) return;
            dispatch_floating(source.scalar_type(), [&](auto type) {
                using T = decltype(type);
                if (y.scalar_type() == ScalarType::Byte) {
                    Backend::template elementwise<Quantize, T, uint8_t>(source, y, layout, arguments.table());
                } else {
                    Backend::template elementwise<FakeQuantize, T, T>(source, y, layout, arguments.table());
                }
            });
        }
    };
};

// quantize_pack and unpack_dequantize. The backend's
//     template <class T>
//     static void pack(const Tensor& x, const Tensor& packed, const PackLayout&, const QuantizerTable&,
//     int64_t axis) template <class T> static void unpack(const Tensor& packed, const Tensor& x, ... the
//     same)
// see a contiguous packed tensor, and an unpacked one that is contiguous or channels_last and not empty.
template <class Backend>
struct PackOps {
    static Tensor quantize_pack(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis) {
        const char* op = "quantize_pack";
        const auto arguments = check_unpacked(op, x, scale, zero_point, axis);
        const auto sizes = packed_sizes(x);
        Tensor packed = empty_strided(sizes, contiguous_strides(sizes), ScalarType::Byte, x);
        fill_packed(x, arguments, axis, packed);
        return packed;
    }

    static void quantize_pack_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                                  const Tensor& out) {
        const char* op = "quantize_pack";
        const auto arguments = check_unpacked(op, x, scale, zero_point, axis);
        const auto sizes = packed_sizes(x);
        check_out(op, out, ScalarType::Byte, sizes, contiguous_strides(sizes), x);
        check_apart(op, out, "x", x);
        arguments.check_apart_from(op, out);
        fill_packed(x, arguments, axis, out);
    }

    static Tensor unpack_dequantize(const Tensor& packed, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                                    int64_t channels, int64_t dtype) {
        const char* op = "unpack_dequantize";
        check_packed(op, packed);
        STD_TORCH_CHECK(channels >= 0 && pairs(channels) == packed.size(packed.dim() - 1), op, ": channels is ",
                        channels, ", which does not fit the packed shape ", shape_of(packed));
        const ScalarType type = floating_type(op, dtype);
        const auto arguments = check_packed_quantizer(op, packed, scale, zero_point, channels, axis);
        Tensor out = empty_unpacked(packed, channels, type);
        fill_unpacked(packed, arguments, axis, out);
        return out;
    }

    static void unpack_dequantize_out(const Tensor& packed, const Tensor& scale, const Tensor& zero_point,
                                      int64_t axis, const Tensor& out) {
        const char* op = "unpack_dequantize";
        check_packed(op, packed);
        const bool fits = is_floating(out.scalar_type()) && out.dim() == packed.dim() &&
                          list_of(packed_sizes(out)) == shape_of(packed);
        STD_TORCH_CHECK(fits && device_of(out) == device_of(packed), op,
                        ": out must be floating point, with the channels of the packed shape ", shape_of(packed),
                        " on ", device_of(packed), ", got ", described(out), " on ", device_of(out));
        STD_TORCH_CHECK(out.numel() == 0 || out.is_contiguous() || is_channels_last(out), op,
                        ": out must be contiguous or channels_last, its strides are ", list_of(out.strides()));
        const auto arguments = check_packed_quantizer(op, packed, scale, zero_point, out.size(1), axis);
        check_apart(op, out, "packed", packed);
        arguments.check_apart_from(op, out);
        fill_unpacked(packed, arguments, axis, out);
    }

private:
    static QuantizerArguments check_unpacked(const char* op, const Tensor& x, const Tensor& scale,
                                             const Tensor& zero_point, int64_t& axis) {
        check_input(op, x);
        STD_TORCH_CHECK(x.dim() >= 2, op, ": x must have the shape [N, C, *spatial], got ", shape_of(x));
        axis = pack_axis(op, x.dim(), axis);
        return {op, x, scale, zero_point, std::nullopt, x.size(axis)};
    }

    static QuantizerArguments check_packed_quantizer(const char* op, const Tensor& packed, const Tensor& scale,
                                                     const Tensor& zero_point, int64_t channels, int64_t& axis) {
        axis = pack_axis(op, packed.dim(), axis);
        return {op, packed, scale, zero_point, std::nullopt, axis == 0 ? packed.size(0) : channels};
    }

    static void fill_packed(const Tensor& x, const QuantizerArguments& arguments, int64_t axis,
                            const Tensor& packed) {
        if (x.numel() == 0) return;
        const Tensor source = x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
        dispatch_floating(x.scalar_type(), [&](auto type) {
            Backend::template pack<decltype(type)>(source, packed, pack_layout(source), arguments.table(), axis);
        });
    }

    static void fill_unpacked(const Tensor& packed, const QuantizerArguments& arguments, int64_t axis,
                              const Tensor& x) {
        if (x.numel() == 0) return;
        const Tensor source = as_contiguous(packed);
        dispatch_floating(x.scalar_type(), [&](auto type) {
            Backend::template unpack<decltype(type)>(source, x, pack_layout(x), arguments.table(), axis);
        });
    }
};

// pack_codes and unpack_codes: row r holds codes of bits[r] bits, lowest bit first, and starts at byte
// offsets[r]. The backend's
//     static void pack_rows(const Tensor& codes, const Tensor& packed, const RowTable&)
//     static void unpack_rows(const Tensor& packed, const Tensor& codes, const RowTable&)
// must not leave the packed buffer, whatever the values of bits and offsets on a device; pack_rows zeroes it first.
// Neither is called where there are no codes.
template <class Backend>
struct RowOps {
    static Tensor pack_codes(const Tensor& codes, const Tensor& bits, const Tensor& offsets, int64_t packed_bytes) {
        const char* op = "pack_codes";
        const RowArguments arguments = check_codes(op, codes, bits, offsets);
        STD_TORCH_CHECK(packed_bytes >= 0, op, ": packed_bytes must not be negative, got ", packed_bytes);
        const RowTable table = arguments.table(op, codes.size(1), packed_bytes, true);
        Tensor packed = empty_vector(packed_bytes, ScalarType::Byte, codes);
        if (packed_bytes > 0) Backend::pack_rows(as_contiguous(codes), packed, table);
        return packed;
    }

    static void pack_codes_out(const Tensor& codes, const Tensor& bits, const Tensor& offsets, const Tensor& out) {
        const char* op = "pack_codes";
        const RowArguments arguments = check_codes(op, codes, bits, offsets);
        check_out(op, out, ScalarType::Byte, {out.numel()}, {1}, codes);
        const RowTable table = arguments.table(op, codes.size(1), out.numel(), true);
        check_apart(op, out, "codes", codes);
        arguments.check_apart_from(op, out);
        if (out.numel() > 0) Backend::pack_rows(as_contiguous(codes), out, table);
    }

    static Tensor unpack_codes(const Tensor& packed, const Tensor& bits, const Tensor& offsets, int64_t length) {
        const char* op = "unpack_codes";
        const RowArguments arguments = check_bytes(op, packed, bits, offsets);
        STD_TORCH_CHECK(length >= 0, op, ": length must not be negative, got ", length);
        const RowTable table = arguments.table(op, length, packed.size(0), false);
        const std::vector<int64_t> sizes = {bits.size(0), length};
        Tensor codes = empty_strided(sizes, contiguous_strides(sizes), ScalarType::Byte, packed);
        if (codes.numel() > 0) Backend::unpack_rows(as_contiguous(packed), codes, table);
        return codes;
    }

    static void unpack_codes_out(const Tensor& packed, const Tensor& bits, const Tensor& offsets, const Tensor& out) {
        const char* op = "unpack_codes";
        const RowArguments arguments = check_bytes(op, packed, bits, offsets);
        const int64_t length = out.dim() == 2 ? out.size(1) : 0;
        const std::vector<int64_t> sizes = {bits.size(0), length};
        check_out(op, out, ScalarType::Byte, sizes, contiguous_strides(sizes), packed);
        const RowTable table = arguments.table(op, length, packed.size(0), false);
        check_apart(op, out, "packed", packed);
        arguments.check_apart_from(op, out);
        if (out.numel() > 0) Backend::unpack_rows(as_contiguous(packed), out, table);
    }

private:
    static RowArguments check_codes(const char* op, const Tensor& codes, const Tensor& bits, const Tensor& offsets) {
        STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2, op,
                        ": codes must be a uint8 tensor [rows, length], got ", described(codes));
        return {op, codes, bits, offsets, codes.size(0)};
    }

    static RowArguments check_bytes(const char* op, const Tensor& packed, const Tensor& bits, const Tensor& offsets) {
        STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1, op,
                        ": packed must be a uint8 tensor [bytes], got ", described(packed));
        return {op, packed, bits, offsets, bits.numel()};
    }
};

// channel_statistics. The backend's
//     template <class T>
//     static void statistics(const Tensor& x, const ChannelLayout&, const double* centre, double* out)
// fills float64 [channels, kStatistics] from a dense tensor that may have no elements; centre may be nullptr.
template <class Backend>
struct StatisticsOps {
    static Tensor channel_statistics(const Tensor& x, int64_t axis, std::optional<Tensor> centre) {
        const char* op = "channel_statistics";
        check_input(op, x);
        const Tensor source = dense(x);
        const ChannelLayout layout = channel_layout(source, normalized_axis(op, x, axis));
        std::optional<Tensor> about;
        if (centre) {
            check_vector(op, "centre", *centre, ScalarType::Double, layout.channels, x);
            about = as_contiguous(*centre);
        }
        const std::vector<int64_t> sizes = {layout.channels, kStatistics};
        Tensor out = empty_strided(sizes, contiguous_strides(sizes), ScalarType::Double, x);
        dispatch_floating(x.scalar_type(), [&](auto type) {
            Backend::template statistics<decltype(type)>(
                source, layout, about ? about->const_data_ptr<double>() : nullptr, out.mutable_data_ptr<double>());
        });
        return out;
    }
};

// channel_histogram. The backend's
//     template <class T>
//     static void histogram(const Tensor& x, const ChannelLayout&, const BinTable&, int64_t* out)
// fills int64 [channels, bins], which it must zero, from a dense tensor that may have no elements.
template <class Backend>
struct HistogramOps {
    static Tensor channel_histogram(const Tensor& x, const Tensor& low, const Tensor& high, int64_t bins,
                                    int64_t axis) {
        const char* op = "channel_histogram";
        check_input(op, x);
        axis = normalized_axis(op, x, axis);
        STD_TORCH_CHECK(1 <= bins && bins <= kMaximumBins, op, ": bins must be 1 to ", kMaximumBins, ", got ", bins);
        const Tensor source = dense(x);
        const ChannelLayout layout = channel_layout(source, axis);
        const BinArguments arguments(op, x, low, high, layout.channels);
        const std::vector<int64_t> sizes = {layout.channels, bins};
        Tensor out = empty_strided(sizes, contiguous_strides(sizes), ScalarType::Long, x);
        if (layout.channels == 0) return out;
        dispatch_floating(x.scalar_type(), [&](auto type) {
            Backend::template histogram<decltype(type)>(source, layout, arguments.table(bins),
                                                        out.mutable_data_ptr<int64_t>());
        });
        return out;
    }
};

}  // namespace ptq4cuda
