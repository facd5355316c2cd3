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

constexpr int64_t kPixels = 256;      // neighbouring pixels handled together,
constexpr int64_t kWords = 8;         // and 32-bit words of each,
constexpr int kWord = 8;              // and codes of each word
constexpr int64_t kAhead = 8;         // rows of a channel each, far apart, that are asked for before they are written
constexpr int64_t kBuffer = 1 << 13;  // codes held in the first-level cache between two steps

// Pairs of bytes are handled as 16-bit words, low code in the low byte (x86 and Arm are little-endian).
struct PackNibbles {  // n code pairs
    static PTQ_INLINE void run(const uint8_t* __restrict codes, uint8_t* __restrict packed, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            uint16_t pair;
            std::memcpy(&pair, codes + 2 * i, sizeof pair);
            packed[i] = static_cast<uint8_t>((pair & 0x0f) | (pair >> 4 & 0xf0));
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

// Eight channels of one pixel are a 32-bit word of the packed tensor. Where pixels are neighbours in memory (NCHW),
// the words of many pixels are made at once.
template <class Value>
struct WordRows {
    const Value* row[kWord];
    Quantizer quantizer[kWord];
    int64_t ahead;  // from a row to the one that is read next
};
template <class Value>
struct MakeWords {
    static PTQ_INLINE void run(const WordRows<Value>* x, uint32_t* __restrict words, int64_t n) {
        constexpr int64_t kLine = simd::kLineOf<Value>;
        int64_t i = 0;
        for (; i + kLine <= n; i += kLine) {
            for (int k = 0; k < kWord; ++k) __builtin_prefetch(x->row[k] + i + x->ahead);
            make(*x, words, i, kLine);
        }
        make(*x, words, i, n - i);
    }
    static PTQ_INLINE void make(const WordRows<Value>& x, uint32_t* __restrict words, int64_t begin, int64_t n) {
        for (int64_t i = begin; i < begin + n; ++i) {
            uint32_t word = 0;
            for (int k = 0; k < kWord; ++k)
                word |= static_cast<uint32_t>(int_code(simd::to_float(x.row[k][i]), x.quantizer[k])) << 4 * k;
            words[i] = word;
        }
    }
};
template <class Value>
struct TakeFromWords {
    static PTQ_INLINE void run(const uint32_t* __restrict words, Value* __restrict x, int64_t n, Quantizer q,
                               int shift) {
        for (int64_t i = 0; i < n; ++i)
            simd::store(value(static_cast<float>(static_cast<int32_t>(words[i] >> shift & 15u)), q), x[i]);
    }
};

// Words as they are made, kPixels of one kind after the other, and as they are packed, those of one pixel together.
struct Interleave {
    static PTQ_INLINE void run(const uint32_t* __restrict words, uint32_t* __restrict pixels, int64_t n) {
        for (int64_t p = 0; p < n; ++p)
            for (int64_t w = 0; w < kWords; ++w) pixels[p * kWords + w] = words[w * kPixels + p];
    }
};
struct Deinterleave {
    static PTQ_INLINE void run(const uint32_t* __restrict pixels, uint32_t* __restrict words, int64_t n) {
        for (int64_t p = 0; p < n; ++p)
            for (int64_t w = 0; w < kWords; ++w) words[w * kPixels + p] = pixels[p * kWords + w];
    }
};

// The words of n pixels, or as many bytes of them as there are, from rows to rows that are so many bytes apart.
inline void copy_words(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t bytes, int64_t n) {
    constexpr int64_t kBytes = kWords * sizeof(uint32_t);
    const auto* source = static_cast<const uint8_t*>(from);
    auto* target = static_cast<uint8_t*>(to);
    for (int64_t p = 0; p < n; ++p, source += from_stride, target += to_stride)
        bytes < kBytes ? std::memcpy(target, source, bytes) : std::memcpy(target, source, kBytes);
}

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

// Some pixels of a [N, C, spatial] tensor, and some of their words: the first of up to eight channels each.
struct WordTile {
    int64_t n, pixel, pixels, channel, words;
};

// Calls f(tile, next tile) for all tiles, those of the same pixels one after the other: their rows of packed codes
// stay in cache. The last tile has itself as its next.
template <class F>
void for_each_tile(const PackLayout& layout, const F& f) {
    const int64_t words = ceil_div(layout.channels, kWord), across = ceil_div(words, kWords);
    const int64_t stretches = ceil_div(layout.spatial, kPixels);
    const auto tile = [&](int64_t t) -> WordTile {
        const int64_t word = t % across * kWords, stretch = t / across % stretches;
        const int64_t pixel = stretch * kPixels;
        return {t / across / stretches, pixel, std::min(kPixels, layout.spatial - pixel), word * kWord,
                std::min(kWords, words - word)};
    };
    const int64_t grain = kGrain / (layout.channels * std::min(layout.spatial, kPixels)) + 1;
    torch::stable::parallel_for(0, layout.batch * stretches, grain, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin * across; t < end * across; ++t) f(tile(t), tile(std::min(t + 1, end * across - 1)));
        simd::end_stream();
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
                simd::Vector<uint8_t> codes(step * channels), pad(step);
                for (int64_t row = begin; row < end; row += step) {
                    const int64_t count = std::min(step, end - row);
                    rows(x + row * channels, codes.data(), row * channels, (row + count) * channels);
                    if (channels % 2)
                        for (int64_t r = 0; r < count; ++r) pad[r] = pad_of((row + r) / spatial);
                    pack_rows(codes.data(), packed + row * bytes, count, channels, pad.data());
                }
            });
    } else {
        using Value = typename simd::Block<T, kPixels>::Value;
        const auto row_of = [&](const WordTile& tile, int64_t channel) {
            return x + (tile.n * channels + channel) * spatial + tile.pixel;
        };
        for_each_tile(layout, [&](const WordTile& tile, const WordTile& next) {
            alignas(64) uint32_t words[kWords * kPixels];  // only what is copied is made
            simd::Block<T, kPixels> values[kWord];
            for (int64_t w = 0; w < tile.words; ++w) {
                const int64_t channel = tile.channel + w * kWord;
                const int64_t count = std::min<int64_t>(kWord, channels - channel);
                const bool more = w + 1 < tile.words;
                const int64_t ahead =
                    row_of(more ? tile : next, more ? channel + kWord : next.channel) - row_of(tile, channel);
                WordRows<Value> rows;
                rows.ahead = std::is_same_v<T, Value> ? ahead : 0;
                for (int64_t k = 0; k < kWord; ++k) {
                    rows.row[k] =
                        k < count ? values[k].read(row_of(tile, channel + k), tile.pixels, ahead) : rows.row[0];
                    rows.quantizer[k] = table[axis == 0 ? tile.n : channel + std::min(k, count - 1)];
                    // The codes of missing channels do not depend on what is read in their place.
                    if (k >= count) rows.quantizer[k].inv_scale = 0.0f;
                }
                simd::run<MakeWords<Value>>(static_cast<const WordRows<Value>*>(&rows), words + w * kPixels,
                                            tile.pixels);
            }
            alignas(64) uint32_t pixels[kPixels * kWords];
            simd::run<Interleave>(static_cast<const uint32_t*>(words), static_cast<uint32_t*>(pixels), tile.pixels);
            uint8_t* to = packed + (tile.n * spatial + tile.pixel) * bytes + tile.channel / 2;
            copy_words(pixels, kWords * sizeof(uint32_t), to, bytes, bytes - tile.channel / 2, tile.pixels);
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
                simd::Vector<uint8_t> codes(step * channels);
                for (int64_t row = begin; row < end; row += step) {
                    const int64_t count = std::min(step, end - row);
                    unpack_rows(packed + row * bytes, codes.data(), count, channels);
                    rows(codes.data(), x + row * channels, row * channels, (row + count) * channels);
                }
            });
    } else {
        using Value = typename simd::Block<T, kPixels>::Value;
        // Where values are made faster than they are written: 16-bit values are not.
        const bool streams = std::is_same_v<T, float> && simd::streams(batch * channels * spatial * sizeof(T));
        for_each_tile(layout, [&](const WordTile& tile, const WordTile&) {
            alignas(64) uint32_t words[kWords * kPixels], pixels[kPixels * kWords];  // only what is copied is used
            const uint8_t* from = packed + (tile.n * spatial + tile.pixel) * bytes + tile.channel / 2;
            copy_words(from, bytes, pixels, kWords * sizeof(uint32_t), bytes - tile.channel / 2, tile.pixels);
            simd::run<Deinterleave>(static_cast<const uint32_t*>(pixels), static_cast<uint32_t*>(words), tile.pixels);
            const int64_t end = std::min(tile.channel + tile.words * kWord, channels);
            simd::Block<T, kPixels> values;
            alignas(64) Value streamed[kPixels];
            for (int64_t c = tile.channel; c < end; ++c) {
                const int64_t place = c - tile.channel;
                T* row = x + (tile.n * channels + c) * spatial + tile.pixel;
                if (!streams && c + kAhead < end) {
                    for (int64_t i = 0; i < tile.pixels; i += simd::kLineOf<T>)
                        __builtin_prefetch(row + kAhead * spatial + i, 1);
                }
                simd::run<TakeFromWords<Value>>(static_cast<const uint32_t*>(words + place / kWord * kPixels),
                                                streams ? streamed : values.begin(row), tile.pixels,
                                                table[axis == 0 ? tile.n : c], static_cast<int>(4 * (place % kWord)));
                streams ? simd::stream(streamed, row, tile.pixels * sizeof(T)) : values.finish(row, tile.pixels);
            }
        });
    }
}

// --- rows of any bit-width ---

void pack_row(const uint8_t* codes, uint8_t* packed, int64_t length, int bits) {
    if (bits == 8) {
        std::memcpy(packed, codes, length);
        return;
    }
    if (bits == 4) {
        simd::run<PackNibbles>(codes, packed, length / 2);
        if (length % 2) packed[length / 2] = low_nibble(codes[length - 1]);
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
        const uint8_t* from = codes.const_data_ptr<uint8_t>();
        uint8_t* to = packed.mutable_data_ptr<uint8_t>();
        std::memset(to, 0, table.packed_bytes);
        if (codes.numel() == 0) return;
        for_each_row(table, [&](int64_t r) {
            pack_row(from + r * table.length, to + table.offsets[r], table.length, table.bits[r]);
        });
    }

    static void unpack_rows(const Tensor& packed, const Tensor& codes, const RowTable& table) {
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
    m.impl("pack_codes.out", TORCH_BOX(&RowOps<Cpu>::pack_codes_out));
    m.impl("unpack_codes", TORCH_BOX(&RowOps<Cpu>::unpack_codes));
    m.impl("unpack_codes.out", TORCH_BOX(&RowOps<Cpu>::unpack_codes_out));
}

}  // namespace ptq4cuda
