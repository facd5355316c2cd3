// Packed codes on the CPU.
//
// quantize_pack / unpack_dequantize: two 4-bit codes a byte along the channels, which become the innermost
// dimension: [N, C, *spatial] <-> [N, *spatial, ceil(C / 2)].
// pack_codes / unpack_codes: row r holds codes of bits[r] bits, lowest bit first, and starts at byte
// offsets[r].
#include <cstring>

#include "../entry.h"
#include "rows.h"

namespace ptq4cuda {
namespace {

constexpr int64_t kTilePixels = 256;  // of a tile that is transposed
constexpr int64_t kTileBytes = 64;    // of packed channels in it: a cache line
constexpr int64_t kBuffer = 1 << 13;  // codes held in the first-level cache between two steps

// Pairs of bytes are handled as 16-bit words, low code in the low byte (x86 and Arm are little-endian).
struct PackNibbles {  // n code pairs
    static PTQ_INLINE void run(const uint8_t* __restrict codes, uint8_t* __restrict packed, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            uint16_t pair;
            std::memcpy(&pair, codes + 2 * i, sizeof pair);
            packed[i] = static_cast<uint8_t>(pair | pair >> 4);
        }
    }
};
struct UnpackNibbles {  // n code pairs
    static PTQ_INLINE void run(const uint8_t* __restrict packed, uint8_t* __restrict codes, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const uint16_t pair = (packed[i] | packed[i] << 4) & 0x0f0f;
            std::memcpy(codes + 2 * i, &pair, sizeof pair);
        }
    }
};
struct JoinNibbles {  // n low and n high codes
    static PTQ_INLINE void run(const uint8_t* __restrict low, const uint8_t* __restrict high,
                               uint8_t* __restrict packed, int64_t n) {
        for (int64_t i = 0; i < n; ++i) packed[i] = pack_nibbles(low[i], high[i]);
    }
};
struct SplitNibbles {  // n bytes to n low and n high codes
    static PTQ_INLINE void run(const uint8_t* __restrict packed, uint8_t* __restrict low, uint8_t* __restrict high,
                               int64_t n) {
        for (int64_t i = 0; i < n; ++i) low[i] = low_nibble(packed[i]), high[i] = high_nibble(packed[i]);
    }
};

// Transposes bytes: `rows` rows of `columns` bytes, from_stride apart, to `columns` rows, to_stride apart. Blocks of
// 8 x 8 are transposed in eight 64-bit words, swapping ever larger squares across the diagonal.
struct Transpose {
    static PTQ_INLINE void run(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride, int64_t rows,
                               int64_t columns) {
        const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
        for (int64_t r = 0; r < whole_rows; r += 8)
            for (int64_t c = 0; c < whole_columns; c += 8) {
                uint64_t w[8];
                for (int k = 0; k < 8; ++k) std::memcpy(&w[k], from + (r + k) * from_stride + c, 8);
                swap_squares<1>(w, 0x00ff00ff00ff00ffull);
                swap_squares<2>(w, 0x0000ffff0000ffffull);
                swap_squares<4>(w, 0x00000000ffffffffull);
                for (int k = 0; k < 8; ++k) std::memcpy(to + (c + k) * to_stride + r, &w[k], 8);
            }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
                to[c * to_stride + r] = from[r * from_stride + c];
    }

private:
    // In every pair of rows `size` apart: the upper right square of `size` bytes changes places with the lower left.
    template <int size>
    static PTQ_INLINE void swap_squares(uint64_t* w, uint64_t left) {
        for (int k = 0; k < 8; ++k) {
            if (k & size) continue;
            const uint64_t swapped = (w[k] >> 8 * size ^ w[k + size]) & left;
            w[k + size] ^= swapped;
            w[k] ^= swapped << 8 * size;
        }
    }
};

// Rows of `channels` codes to rows of ceil(channels / 2) bytes; an odd row ends with the code pad.
void pack_rows(const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t channels, const uint8_t* pad) {
    if (channels % 2 == 0) return simd::run<PackNibbles>(codes, packed, rows * channels / 2);
    for (int64_t r = 0; r < rows; ++r) {
        simd::run<PackNibbles>(codes, packed, channels / 2);
        packed[channels / 2] = pack_nibbles(codes[channels - 1], pad[r]);
        codes += channels;
        packed += channels / 2 + 1;
    }
}

void unpack_rows(const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t channels) {
    if (channels % 2 == 0) return simd::run<UnpackNibbles>(packed, codes, rows * channels / 2);
    for (int64_t r = 0; r < rows; ++r) {
        simd::run<UnpackNibbles>(packed, codes, channels / 2);
        codes[channels - 1] = low_nibble(packed[channels / 2]);
        codes += channels;
        packed += channels / 2 + 1;
    }
}

// A tile of a tensor whose channels are not innermost: packed bytes of neighbouring pixels side by side.
using Tile = uint8_t[kTileBytes][kTilePixels];

// Calls f(sample, first pixel, pixels, first byte, bytes, tile) for every tile of a [N, C, spatial] tensor.
template <class F>
void for_each_tile(const PackLayout& layout, const F& f) {
    const int64_t bytes = layout.packed_channels();
    const int64_t across = (layout.spatial + kTilePixels - 1) / kTilePixels,
                  down = (bytes + kTileBytes - 1) / kTileBytes;
    const int64_t grain = kGrain / (2 * std::min(bytes, kTileBytes) * std::min(layout.spatial, kTilePixels)) + 1;
    torch::stable::parallel_for(0, layout.batch * across * down, grain, [&](int64_t begin, int64_t end) {
        alignas(64) Tile tile;
        for (int64_t t = begin; t < end; ++t) {
            const int64_t n = t / (across * down), pixel = t / down % across * kTilePixels,
                          byte = t % down * kTileBytes;
            f(n, pixel, std::min(kTilePixels, layout.spatial - pixel), byte, std::min(kTileBytes, bytes - byte),
              tile);
        }
    });
}

template <class T>
void quantize_pack_all(const T* x, uint8_t* packed, const PackLayout& layout, const QuantizerTable& table,
                       int64_t axis) {
    const int64_t batch = layout.batch, channels = layout.channels, spatial = layout.spatial;
    const int64_t bytes = layout.packed_channels();
    const Rows<Quantize, T, uint8_t> rows(layout.rows(axis), table);
    // An odd row is padded with the zero point of its last channel.
    const auto pad_of = [&](int64_t n) {
        return static_cast<uint8_t>(zero_code(table[axis == 0 ? n : channels - 1]));
    };
    if (layout.channels_last) {
        const int64_t step = std::max<int64_t>(1, kBuffer / channels);
        torch::stable::parallel_for(
            0, batch * spatial, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
                std::vector<uint8_t> codes(step * channels), pad(step);
                for (int64_t row = begin; row < end; row += step) {
                    const int64_t count = std::min(step, end - row);
                    rows(x + row * channels, codes.data(), row * channels, (row + count) * channels);
                    if (channels % 2)
                        for (int64_t r = 0; r < count; ++r) pad[r] = pad_of((row + r) / spatial);
                    pack_rows(codes.data(), packed + row * bytes, count, channels, pad.data());
                }
            });
    } else {
        for_each_tile(layout, [&](int64_t n, int64_t pixel, int64_t pixels, int64_t byte, int64_t width, Tile& tile) {
            uint8_t low[kTilePixels], high[kTilePixels];
            for (int64_t b = 0; b < width; ++b) {
                const int64_t channel = 2 * (byte + b);
                const int64_t first = (n * channels + channel) * spatial + pixel;
                rows(x + first, low, first, first + pixels);
                if (channel + 1 < channels) {
                    rows(x + first + spatial, high, first + spatial, first + spatial + pixels);
                } else {
                    std::memset(high, pad_of(n), pixels);
                }
                simd::run<JoinNibbles>(low, high, tile[b], pixels);
            }
            simd::run<Transpose>(tile[0], kTilePixels, packed + (n * spatial + pixel) * bytes + byte, bytes, width,
                                 pixels);
        });
    }
}

template <class T>
void unpack_dequantize_all(const uint8_t* packed, T* x, const PackLayout& layout, const QuantizerTable& table,
                           int64_t axis) {
    const int64_t batch = layout.batch, channels = layout.channels, spatial = layout.spatial;
    const int64_t bytes = layout.packed_channels();
    const Rows<Dequantize, uint8_t, T> rows(layout.rows(axis), table);
    if (layout.channels_last) {
        const int64_t step = std::max<int64_t>(1, kBuffer / channels);
        torch::stable::parallel_for(
            0, batch * spatial, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
                std::vector<uint8_t> codes(step * channels);
                for (int64_t row = begin; row < end; row += step) {
                    const int64_t count = std::min(step, end - row);
                    unpack_rows(packed + row * bytes, codes.data(), count, channels);
                    rows(codes.data(), x + row * channels, row * channels, (row + count) * channels);
                }
            });
    } else {
        for_each_tile(layout, [&](int64_t n, int64_t pixel, int64_t pixels, int64_t byte, int64_t width, Tile& tile) {
            uint8_t low[kTilePixels], high[kTilePixels];
            simd::run<Transpose>(packed + (n * spatial + pixel) * bytes + byte, bytes, tile[0], kTilePixels, pixels,
                                 width);
            for (int64_t b = 0; b < width; ++b) {
                simd::run<SplitNibbles>(tile[b], low, high, pixels);
                const int64_t channel = 2 * (byte + b);
                const int64_t first = (n * channels + channel) * spatial + pixel;
                rows(low, x + first, first, first + pixels);
                if (channel + 1 < channels)
                    rows(high, x + first + spatial, first + spatial, first + spatial + pixels);
            }
        });
    }
}

// --- rows of any bit-width
// -----------------------------------------------------------------------------------

void pack_row(const uint8_t* codes, uint8_t* packed, int64_t length, int bits) {
    if (bits == 8) {
        std::memcpy(packed, codes, length);
        return;
    }
    uint32_t pending = 0;  // bits not yet written, lowest first
    int count = 0;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < length; ++i) {
        pending |= (codes[i] & mask) << count;
        for (count += bits; count >= 8; count -= 8) {
            *packed++ = static_cast<uint8_t>(pending);
            pending >>= 8;
        }
    }
    if (count > 0) *packed = static_cast<uint8_t>(pending);
}

void unpack_row(const uint8_t* packed, uint8_t* codes, int64_t length, int bits) {
    if (bits == 8) {
        std::memcpy(codes, packed, length);
    } else if (bits == 4) {
        simd::run<UnpackNibbles>(packed, codes, length / 2);
        if (length % 2) codes[length - 1] = low_nibble(packed[length / 2]);
    } else {
        uint32_t pending = 0;
        int count = 0;
        const uint32_t mask = (1u << bits) - 1;
        for (int64_t i = 0; i < length; ++i) {
            if (count < bits) {
                pending |= static_cast<uint32_t>(*packed++) << count;
                count += 8;
            }
            codes[i] = static_cast<uint8_t>(pending & mask);
            pending >>= bits;
            count -= bits;
        }
    }
}

// Raises if a row leaves the packed buffer.
void check_rows(const char* op, const RowTable& table) {
    for (int64_t r = 0; r < table.rows; ++r) {
        STD_TORCH_CHECK(table.bits[r] <= 8, op, ": bits[", r, "] is ", static_cast<int>(table.bits[r]),
                        ", expected 0 to 8");
        STD_TORCH_CHECK(table.holds(r), op, ": row ", r, " of ", table.length, " codes at byte ", table.offsets[r],
                        " does not fit into ", table.packed_bytes, " bytes");
    }
}

struct Cpu {
    template <class T>
    static void pack(const Tensor& x, const Tensor& packed, const PackLayout& layout, const QuantizerTable& table,
                     int64_t axis) {
        quantize_pack_all(static_cast<const T*>(x.data_ptr()), static_cast<uint8_t*>(packed.data_ptr()), layout,
                          table, axis);
    }

    template <class T>
    static void unpack(const Tensor& packed, const Tensor& x, const PackLayout& layout, const QuantizerTable& table,
                       int64_t axis) {
        unpack_dequantize_all(static_cast<const uint8_t*>(packed.data_ptr()), static_cast<T*>(x.data_ptr()), layout,
                              table, axis);
    }

    static void pack_rows(const Tensor& codes, const Tensor& packed, const RowTable& table) {
        check_rows("pack_codes", table);
        const uint8_t* from = codes.const_data_ptr<uint8_t>();
        uint8_t* to = packed.mutable_data_ptr<uint8_t>();
        if (table.packed_bytes) std::memset(to, 0, table.packed_bytes);
        for_each_row(table, [&](int64_t r) {
            pack_row(from + r * table.length, to + table.offsets[r], table.length, table.bits[r]);
        });
    }

    static void unpack_rows(const Tensor& packed, const Tensor& codes, const RowTable& table) {
        check_rows("unpack_codes", table);
        const uint8_t* from = packed.const_data_ptr<uint8_t>();
        uint8_t* to = codes.mutable_data_ptr<uint8_t>();
        for_each_row(table, [&](int64_t r) {
            unpack_row(from + table.offsets[r], to + r * table.length, table.length, table.bits[r]);
        });
    }

private:
    static void for_each_row(const RowTable& table, const auto& f) {
        const int64_t grain = kGrain / std::max<int64_t>(table.length, 1) + 1;
        torch::stable::parallel_for(0, table.rows, grain, [&](int64_t r, int64_t end) {
            for (; r < end; ++r) f(r);
        });
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) {
    m.impl("quantize_pack", TORCH_BOX(&PackOps<Cpu>::quantize_pack));
    m.impl("quantize_pack.out", TORCH_BOX(&PackOps<Cpu>::quantize_pack_out));
    m.impl("unpack_dequantize", TORCH_BOX(&PackOps<Cpu>::unpack_dequantize));
    m.impl("unpack_dequantize.out", TORCH_BOX(&PackOps<Cpu>::unpack_dequantize_out));
    m.impl("pack_codes", TORCH_BOX(&RowOps<Cpu>::pack_codes));
    m.impl("unpack_codes", TORCH_BOX(&RowOps<Cpu>::unpack_codes));
}

}  // namespace ptq4cuda
