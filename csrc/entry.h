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
        check_input(op, x);
        const Tensor source = dense(x);
        Tensor y = empty_like(source, dtype);
        fill(op, source, scale, zero_point, bits, axis, y);
        return y;
    }

    static void into(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                     const Tensor& bits, int64_t axis, ScalarType dtype, const Tensor& out) {
        check_input(op, x);
        const Tensor source = dense(x);
        check_out(op, out, source, dtype);
        fill(op, source, scale, zero_point, bits, axis, out);
    }

    static void fill(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                     const Tensor& bits, int64_t axis, const Tensor& y) {
        const ChannelLayout layout = channel_layout(x, normalized_axis(op, x, axis));
        const QuantizerArguments arguments(op, x, scale, zero_point, bits, layout.channels);
        if (x.numel() == 0) return;
        dispatch_floating(x.scalar_type(), [&](auto type) {
            using T = decltype(type);
            if (y.scalar_type() == ScalarType::Byte) {
                Backend::template elementwise<Quantize, T, uint8_t>(x, y, layout, arguments.table());
            } else {
                Backend::template elementwise<FakeQuantize, T, T>(x, y, layout, arguments.table());
            }
        });
    }
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
        Tensor out = empty_packed("quantize_pack", x);
        fill_packed(x, scale, zero_point, axis, out);
        return out;
    }

    static void quantize_pack_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                                  const Tensor& out) {
        pack_axis("quantize_pack", x.dim(), axis);
        check_packed("quantize_pack", out, packed_sizes(x));
        check_same_device("quantize_pack", "out", out, x);
        fill_packed(x, scale, zero_point, axis, out);
    }

    static Tensor unpack_dequantize(const Tensor& packed, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                                    int64_t channels, ScalarType dtype) {
        Tensor out = empty_unpacked("unpack_dequantize", packed, channels, dtype);
        fill_unpacked(packed, scale, zero_point, axis, out);
        return out;
    }

    static void unpack_dequantize_out(const Tensor& packed, const Tensor& scale, const Tensor& zero_point,
                                      int64_t axis, const Tensor& out) {
        check_same_device("unpack_dequantize", "out", out, packed);
        fill_unpacked(packed, scale, zero_point, axis, out);
    }

private:
    static void fill_packed(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                            const Tensor& out) {
        const char* op = "quantize_pack";
        check_input(op, x);
        axis = pack_axis(op, x.dim(), axis);
        const QuantizerArguments arguments(op, x, scale, zero_point, std::nullopt, x.size(axis));
        if (x.numel() == 0) return;
        const Tensor source = x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
        dispatch_floating(x.scalar_type(), [&](auto type) {
            Backend::template pack<decltype(type)>(source, out, pack_layout(source), arguments.table(), axis);
        });
    }

    static void fill_unpacked(const Tensor& packed, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                              const Tensor& out) {
        const char* op = "unpack_dequantize";
        axis = pack_axis(op, out.dim(), axis);
        check_input(op, out);
        const Tensor source = torch::stable::contiguous(packed);
        check_packed(op, source, packed_sizes(out));
        STD_TORCH_CHECK(out.is_contiguous() || is_channels_last(out), op,
                        ": out must be contiguous or channels_last, its shape is ", shape_of(out));
        const QuantizerArguments arguments(op, packed, scale, zero_point, std::nullopt, out.size(axis));
        if (out.numel() == 0) return;
        dispatch_floating(out.scalar_type(), [&](auto type) {
            Backend::template unpack<decltype(type)>(source, out, pack_layout(out), arguments.table(), axis);
        });
    }
};

// pack_codes and unpack_codes: row r holds codes of bits[r] bits, lowest bit first, and starts at byte
// offsets[r]. The backend's
//     static void pack_rows(const Tensor& codes, const Tensor& packed, const RowTable&)
//     static void unpack_rows(const Tensor& packed, const Tensor& codes, const RowTable&)
// must not leave the packed buffer, whatever the values of bits and offsets; pack_rows zeroes it first.
template <class Backend>
struct RowOps {
    static Tensor pack_codes(const Tensor& codes, const Tensor& bits, const Tensor& offsets, int64_t packed_bytes) {
        STD_TORCH_CHECK(packed_bytes >= 0, "pack_codes: packed_bytes is ", packed_bytes);
        Tensor packed = empty_vector(packed_bytes, ScalarType::Byte, codes);
        fill_packed(codes, bits, offsets, packed);
        return packed;
    }

    static void pack_codes_out(const Tensor& codes, const Tensor& bits, const Tensor& offsets, const Tensor& out) {
        const char* op = "pack_codes";
        STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.dim() == 1 && out.is_contiguous(), op,
                        ": out must be contiguous uint8 [bytes], got ", shape_of(out));
        check_same_device(op, "out", out, codes);
        fill_packed(codes, bits, offsets, out);
    }

    static Tensor unpack_codes(const Tensor& packed, const Tensor& bits, const Tensor& offsets, int64_t length) {
        STD_TORCH_CHECK(length >= 0, "unpack_codes: length is ", length);
        const std::vector<int64_t> sizes = {bits.numel(), length};
        Tensor codes = empty_strided(sizes, contiguous_strides(sizes), ScalarType::Byte, packed);
        fill_codes(packed, bits, offsets, codes);
        return codes;
    }

    static void unpack_codes_out(const Tensor& packed, const Tensor& bits, const Tensor& offsets, const Tensor& out) {
        const char* op = "unpack_codes";
        STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.dim() == 2 && out.is_contiguous() &&
                            out.size(0) == bits.numel(),
                        op, ": out must be contiguous uint8 [", bits.numel(), ", length], got ", shape_of(out));
        check_same_device(op, "out", out, packed);
        fill_codes(packed, bits, offsets, out);
    }

private:
    static void fill_packed(const Tensor& codes, const Tensor& bits, const Tensor& offsets, const Tensor& packed) {
        const char* op = "pack_codes";
        STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2, op,
                        ": codes must be uint8 [rows, length], got ", shape_of(codes));
        const RowArguments arguments(op, codes, bits, offsets, codes.size(0));
        Backend::pack_rows(torch::stable::contiguous(codes), packed, arguments.table(codes.size(1), packed.size(0)));
    }

    static void fill_codes(const Tensor& packed, const Tensor& bits, const Tensor& offsets, const Tensor& codes) {
        const char* op = "unpack_codes";
        STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1, op,
                        ": packed must be uint8 [bytes], got ", shape_of(packed));
        const RowArguments arguments(op, packed, bits, offsets, bits.numel());
        Backend::unpack_rows(torch::stable::contiguous(packed), codes,
                             arguments.table(codes.size(1), packed.size(0)));
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
            STD_TORCH_CHECK(centre->scalar_type() == ScalarType::Double && centre->dim() == 1 &&
                                centre->size(0) == layout.channels,
                            op, ": centre must be float64 [", layout.channels, "], its shape is ", shape_of(*centre));
            check_same_device(op, "centre", *centre, x);
            about = torch::stable::contiguous(*centre);
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
        STD_TORCH_CHECK(1 <= bins && bins <= kMaximumBins, op, ": bins must be 1 to ", kMaximumBins, ", got ", bins);
        const Tensor source = dense(x);
        const ChannelLayout layout = channel_layout(source, normalized_axis(op, x, axis));
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
