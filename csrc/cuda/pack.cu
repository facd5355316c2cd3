// Packed codes on CUDA.
//
// quantize_pack / unpack_dequantize: [N, C, *spatial] <-> [N, *spatial, ceil(C / 2)], two 4-bit codes a byte along
// the channels. Eight channels of a pixel are a 32-bit word.
//   channels_last, C even: the codes of neighbouring values in memory are neighbours in the packed tensor, too, so
//   this
//       is elementwise work on groups of eight values and one word (elementwise.cuh).
//   otherwise (NCHW, and an odd C, whose pixels end with half a byte of padding): a tile of pixels by words goes
//       through shared memory. Unpacked values are touched along the pixels, packed words along the channels, so that
//       both sides move whole cache lines.
//
//           one thread: 8 channels x V pixels            shared tile                  packed, one row a pixel
//           c+0  p p+1 ... p+V-1   (16 bytes)            p     w0 w1 w2 ...           p     w0 w1 w2 ...
//           c+1  p p+1 ... p+V-1               --->      p+1   w0 w1 w2 ...    --->   p+1   w0 w1 w2 ...
//           ...                                          ...                          ...
//
// pack_codes / unpack_codes: row r holds codes of bits[r] bits, lowest bit first, from byte offsets[r] on. Eight
// codes of b bits are exactly b bytes, which is what a thread moves; no byte is shared between threads.
#include "elementwise.cuh"

namespace ptq4cuda {
namespace {

constexpr int kCodes = 8;  // 4-bit codes in a word

// --- channels_last -----------------------------------------------------------------------------------------------

// Eight values and a word.
template <class T>
struct PackGroup {
    using Input = T;
    using Output = uint8_t;
    using Parameters = Coding;
    static constexpr int kGroup = kCodes, kInputs = kCodes, kOutputs = kCodes / 2, kUnit = 2;
    using Group = Values<T, kGroup>;

    template <class Quantizers>
    static __device__ __forceinline__ Words<4> apply(const Words<Group::kBytes>& in, const Quantizers& quantizers) {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) word += quantizers.of(j).zero_point() << 4 * j;
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
            word += static_cast<uint32_t>(quantizers.of(j).level(Group::get(in, j))) << 4 * j;
        return {{word}};
    }
    template <class F>
    static __device__ void one(const T* x, uint8_t* y, int64_t i, const F& quantizer_of) {
        y[i] = pack_nibbles(code(static_cast<float>(x[2 * i]), quantizer_of(2 * i)),
                            code(static_cast<float>(x[2 * i + 1]), quantizer_of(2 * i + 1)));
    }
};

// 16 bytes of T, of two or four bytes of codes.
template <class T>
struct UnpackGroup {
    using Input = uint8_t;
    using Output = T;
    using Parameters = Decoding;
    static constexpr int kGroup = 16 / sizeof(T), kInputs = kGroup / 2, kOutputs = kGroup, kUnit = 2;

    template <class Quantizers>
    static __device__ __forceinline__ Words<16> apply(const Words<kInputs>& in, const Quantizers& quantizers) {
        const Nibbles nibbles(in.at[0]);
        return Values<T, kGroup>::make([&](int j) { return quantizers.of(j)(nibbles.bits(j)); });
    }
    template <class F>
    static __device__ void one(const uint8_t* x, T* y, int64_t i, const F& quantizer_of) {
        y[2 * i] = Dequantize::apply<T>(low_nibble(x[i]), quantizer_of(2 * i));
        y[2 * i + 1] = Dequantize::apply<T>(high_nibble(x[i]), quantizer_of(2 * i + 1));
    }
};

// --- tiles -------------------------------------------------------------------------------------------------------

constexpr int kTileChannels = 128;
constexpr int64_t kTileBlocks = 64;  // at most so many for each multiprocessor; they take several tiles beyond that
constexpr int tile_words(int vector) { return kThreads * (vector < 4 ? 4 : vector); }

// Pixels are numbered through all samples: pixel p is pixel p % spatial of sample p / spatial.
struct Tiles {
    int64_t count, across;  // tiles, and tiles side by side along the channels
    int64_t pixels, spatial, channels, bytes;
    int64_t sample_stride, channel_stride, pixel_stride;  // of the unpacked tensor
    int log_words;                                        // a tile is 2^log_words words wide
    bool by_sample;                                       // quantizers along the samples
    bool words_aligned;                                   // packed pixels are whole words

    __device__ int words() const { return 1 << log_words; }
    __device__ int64_t first_pixel(int64_t tile, int total_words) const {
        return tile / across * (total_words >> log_words);
    }
    __device__ int64_t first_channel(int64_t tile) const { return (tile % across << log_words) * kCodes; }
    __device__ int64_t sample(int64_t pixel) const { return pixel / spatial; }
    __device__ int64_t offset(int64_t pixel, int64_t sample) const {
        return sample * sample_stride + (pixel - sample * spatial) * pixel_stride;
    }
    // Bytes of the packed word at a channel; 0 right of the last channel.
    __device__ int word_bytes(int64_t channel) const {
        return static_cast<int>(max(min(bytes - channel / 2, int64_t{4}), int64_t{0}));
    }
};

// The quantizers of a tile's channels. Right of the last channel its own is repeated: it is the padding's.
__device__ void stage_quantizers(Quantizer* quantizers, const QuantizerTable& table, const Tiles& tiles,
                                 int64_t first_channel) {
    if (tiles.by_sample) return;
    for (int c = threadIdx.x; c < tiles.words() * kCodes; c += kThreads)
        quantizers[c] = table[min(first_channel + c, tiles.channels - 1)];
}

// A thread's work in a tile: V pixels by the eight channels of a word.
template <int V, class F>
__device__ __forceinline__ void for_each_task(const Tiles& tiles, int64_t first_pixel, const F& f) {
    constexpr int kWords = tile_words(V);
    const int log_pixels = 31 - __clz(kWords / V) - tiles.log_words;  // pixels / V is a power of two
    for (int task = threadIdx.x; task < kWords / V; task += kThreads) {
        const int pixel = (task & ((1 << log_pixels) - 1)) * V, word = task >> log_pixels;
        if (first_pixel + pixel < tiles.pixels) f(pixel, word);
    }
}

// A row of the shared tile is one word longer than needed, so that a column does not fall into one bank.
__device__ __forceinline__ int place(const Tiles& tiles, int pixel, int word) {
    return pixel * (tiles.words() + 1) + word;
}

// The packed words of a tile: f(place in the shared tile, first byte in the packed tensor, bytes).
template <class F>
__device__ __forceinline__ void for_each_word(const Tiles& tiles, int total_words, int64_t first_pixel,
                                              int64_t first_channel, const F& f) {
    for (int i = threadIdx.x; i < total_words; i += kThreads) {
        const int pixel = i >> tiles.log_words, word = i & (tiles.words() - 1);
        const int64_t c = first_channel + word * kCodes;
        if (first_pixel + pixel >= tiles.pixels) break;
        f(place(tiles, pixel, word), (first_pixel + pixel) * tiles.bytes + c / 2, tiles.word_bytes(c));
    }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    pack_tiles_kernel(const T* x, uint8_t* packed, QuantizerTable table, Tiles tiles) {
    constexpr int kWords = tile_words(V);
    __shared__ uint32_t tile[2 * kWords];
    __shared__ Quantizer quantizers[kTileChannels];

    for (int64_t t = blockIdx.x; t < tiles.count; t += gridDim.x) {
        const int64_t first_pixel = tiles.first_pixel(t, kWords), first_channel = tiles.first_channel(t);
        stage_quantizers(quantizers, table, tiles, first_channel);
        __syncthreads();
        for_each_task<V>(tiles, first_pixel, [&](int pixel, int word) {
            const int64_t n = tiles.sample(first_pixel + pixel), c = first_channel + word * kCodes;
            const T* from = x + tiles.offset(first_pixel + pixel, n) + c * tiles.channel_stride;
            Vector<T, V> in[kCodes];
#pragma unroll
            for (int k = 0; k < kCodes; ++k)
                if (c + k < tiles.channels) in[k] = load<V>(from + k * tiles.channel_stride, true);
            uint32_t words[V] = {};
            const Quantizer by_sample = tiles.by_sample ? table[n] : Quantizer{};
#pragma unroll
            for (int k = 0; k < kCodes; ++k) {
                const Quantizer q = tiles.by_sample ? by_sample : quantizers[word * kCodes + k];
                const bool padding = c + k >= tiles.channels;
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const uint32_t nibble =
                        padding ? static_cast<uint32_t>(zero_code(q)) : code(static_cast<float>(in[k].at[j]), q);
                    words[j] |= nibble << (4 * k);
                }
            }
#pragma unroll
            for (int j = 0; j < V; ++j) tile[place(tiles, pixel + j, word)] = words[j];
        });
        __syncthreads();
        for_each_word(tiles, kWords, first_pixel, first_channel, [&](int at, int64_t byte, int count) {
            uint8_t* to = packed + byte;
            if (tiles.words_aligned && count == 4) {
                *reinterpret_cast<uint32_t*>(to) = tile[at];
            } else {
                for (int b = 0; b < count; ++b) to[b] = static_cast<uint8_t>(tile[at] >> (8 * b));
            }
        });
        // The barrier after the next quantizers also ends the reading of this tile.
    }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    unpack_tiles_kernel(const uint8_t* packed, T* x, QuantizerTable table, Tiles tiles) {
    constexpr int kWords = tile_words(V);
    __shared__ uint32_t tile[2 * kWords];
    __shared__ Quantizer quantizers[kTileChannels];

    for (int64_t t = blockIdx.x; t < tiles.count; t += gridDim.x) {
        const int64_t first_pixel = tiles.first_pixel(t, kWords), first_channel = tiles.first_channel(t);
        stage_quantizers(quantizers, table, tiles, first_channel);
        for_each_word(tiles, kWords, first_pixel, first_channel, [&](int at, int64_t byte, int count) {
            const uint8_t* from = packed + byte;
            uint32_t value = 0;
            if (tiles.words_aligned && count == 4) {
                value = *reinterpret_cast<const uint32_t*>(from);
            } else {
                for (int b = 0; b < count; ++b) value |= uint32_t{from[b]} << (8 * b);
            }
            tile[at] = value;
        });
        __syncthreads();
        for_each_task<V>(tiles, first_pixel, [&](int pixel, int word) {
            const int64_t n = tiles.sample(first_pixel + pixel), c = first_channel + word * kCodes;
            T* to = x + tiles.offset(first_pixel + pixel, n) + c * tiles.channel_stride;
            uint32_t words[V];
#pragma unroll
            for (int j = 0; j < V; ++j) words[j] = tile[place(tiles, pixel + j, word)];
            const Quantizer by_sample = tiles.by_sample ? table[n] : Quantizer{};
#pragma unroll
            for (int k = 0; k < kCodes; ++k) {
                if (c + k >= tiles.channels) break;
                const Quantizer q = tiles.by_sample ? by_sample : quantizers[word * kCodes + k];
                Vector<T, V> out;
#pragma unroll
                for (int j = 0; j < V; ++j)
                    out.at[j] = Dequantize::apply<T>(static_cast<float>(words[j] >> (4 * k) & 0xf), q);
                store<V>(to + k * tiles.channel_stride, out, true);
            }
        });
        __syncthreads();  // the tile is read before the next one overwrites it
    }
}

// Calls run(std::integral_constant<int, V>, tiles, grid): V neighbouring pixels are one vector.
template <class T, class F>
void with_tiles(const PackLayout& layout, int64_t axis, const T* x, const uint8_t* packed, const F& run) {
    Tiles tiles;
    tiles.pixels = layout.batch * layout.spatial;
    tiles.spatial = layout.spatial;
    tiles.channels = layout.channels;
    tiles.bytes = layout.packed_channels();
    tiles.sample_stride = layout.channels * layout.spatial;
    tiles.channel_stride = layout.channels_last ? 1 : layout.spatial;
    tiles.pixel_stride = layout.channels_last ? layout.channels : 1;
    tiles.by_sample = axis == 0;
    tiles.words_aligned = tiles.bytes % 4 == 0 && reinterpret_cast<uintptr_t>(packed) % 4 == 0;
    const int64_t words = ceil_div(tiles.bytes, 4);
    tiles.log_words = 0;
    while (1 << tiles.log_words < words && 1 << tiles.log_words < kTileChannels / kCodes) ++tiles.log_words;
    tiles.across = ceil_div(words, 1 << tiles.log_words);
    with_vector_width(x, layout.channels_last ? 1 : layout.spatial, [&](auto width) {
        tiles.count = ceil_div(tiles.pixels, tile_words(width) >> tiles.log_words) * tiles.across;
        run(width, tiles, std::min(tiles.count, multiprocessors() * kTileBlocks));
    });
}

// --- rows of any bit-width ---------------------------------------------------------------------------------------

// Calls f(row, its bits, first code of eight, codes there are of these) for the work of one thread. A row that would
// leave the packed buffer is taken for one of 0 bits, which has no bytes: the table lies on the device, where nobody
// can raise an error.
template <class F>
__device__ __forceinline__ void for_each_eight(const RowTable& table, const F& f) {
    const int64_t groups = (table.length + kCodes - 1) / kCodes;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < table.rows * groups;
         i += int64_t{gridDim.x} * kThreads) {
        const int64_t row = i / groups, first = i % groups * kCodes;
        f(row, table.holds(row) ? table.bits[row] : 0, first,
          static_cast<int>(min(table.length - first, int64_t{kCodes})));
    }
}

__global__ void __launch_bounds__(kThreads) pack_rows_kernel(const uint8_t* codes, uint8_t* packed, RowTable table) {
    for_each_eight(table, [&](int64_t row, int bits, int64_t first, int count) {
        const uint8_t* from = codes + row * table.length + first;
        uint8_t* to = packed + table.offsets[row] + first / kCodes * bits;
        const uint32_t mask = (1u << bits) - 1;
        uint64_t stream = 0;
        for (int k = 0; k < count; ++k) stream |= static_cast<uint64_t>(from[k] & mask) << (k * bits);
        for (int b = 0; b < (count * bits + 7) / 8; ++b) to[b] = static_cast<uint8_t>(stream >> (8 * b));
    });
}

__global__ void __launch_bounds__(kThreads)
    unpack_rows_kernel(const uint8_t* packed, uint8_t* codes, RowTable table) {
    for_each_eight(table, [&](int64_t row, int bits, int64_t first, int count) {
        const uint8_t* from = packed + table.offsets[row] + first / kCodes * bits;
        uint8_t* to = codes + row * table.length + first;
        const uint32_t mask = (1u << bits) - 1;
        uint64_t stream = 0;
        for (int b = 0; b < (count * bits + 7) / 8; ++b) stream |= static_cast<uint64_t>(from[b]) << (8 * b);
        for (int k = 0; k < count; ++k) to[k] = static_cast<uint8_t>(stream >> (k * bits) & mask);
    });
}

int64_t row_grid(const RowTable& table) {
    const int64_t resident = multiprocessors() * kBlocksPerMultiprocessor;
    return std::min(resident, ceil_div(table.rows * ceil_div(table.length, kCodes), kThreads));
}

// --- the ops -----------------------------------------------------------------------------------------------------

struct Cuda {
    template <class T>
    static void pack(const Tensor& x, const Tensor& packed, const PackLayout& layout, const QuantizerTable& table,
                     int64_t axis) {
        const CurrentStream stream(x);
        const T* from = static_cast<const T*>(x.data_ptr());
        uint8_t* to = static_cast<uint8_t*>(packed.data_ptr());
        if (layout.channels_last && layout.channels % 2 == 0)
            return elementwise<PackGroup<T>>(from, to, layout.rows(axis), table, stream);
        with_tiles(layout, axis, from, to, [&](auto width, const Tiles& tiles, int64_t grid) {
            launch(pack_tiles_kernel<T, width>, grid, kThreads, 0, stream, from, to, table, tiles);
        });
    }

    template <class T>
    static void unpack(const Tensor& packed, const Tensor& x, const PackLayout& layout, const QuantizerTable& table,
                       int64_t axis) {
        const CurrentStream stream(x);
        const uint8_t* from = static_cast<const uint8_t*>(packed.data_ptr());
        T* to = static_cast<T*>(x.data_ptr());
        if (layout.channels_last && layout.channels % 2 == 0)
            return elementwise<UnpackGroup<T>>(from, to, layout.rows(axis), table, stream);
        with_tiles(layout, axis, to, from, [&](auto width, const Tiles& tiles, int64_t grid) {
            launch(unpack_tiles_kernel<T, width>, grid, kThreads, 0, stream, from, to, table, tiles);
        });
    }

    static void pack_rows(const Tensor& codes, const Tensor& packed, const RowTable& table) {
        if (table.packed_bytes == 0) return;
        const CurrentStream stream(codes);
        uint8_t* to = packed.mutable_data_ptr<uint8_t>();
        STD_CUDA_CHECK(cudaMemsetAsync(to, 0, table.packed_bytes, stream));
        if (table.rows * table.length == 0) return;
        launch(pack_rows_kernel, row_grid(table), kThreads, 0, stream, codes.const_data_ptr<uint8_t>(), to, table);
    }

    static void unpack_rows(const Tensor& packed, const Tensor& codes, const RowTable& table) {
        if (codes.numel() == 0) return;
        const CurrentStream stream(codes);
        launch(unpack_rows_kernel, row_grid(table), kThreads, 0, stream, packed.const_data_ptr<uint8_t>(),
               codes.mutable_data_ptr<uint8_t>(), table);
    }
};

}  // namespace

PTQ4CUDA_LIBRARY_IMPL(m) {
    m.impl("quantize_pack", TORCH_BOX(&PackOps<Cuda>::quantize_pack));
    m.impl("quantize_pack.out", TORCH_BOX(&PackOps<Cuda>::quantize_pack_out));
    m.impl("unpack_dequantize", TORCH_BOX(&PackOps<Cuda>::unpack_dequantize));
    m.impl("unpack_dequantize.out", TORCH_BOX(&PackOps<Cuda>::unpack_dequantize_out));
    m.impl("pack_codes", TORCH_BOX(&RowOps<Cuda>::pack_codes));
    m.impl("pack_codes.out", TORCH_BOX(&RowOps<Cuda>::pack_codes_out));
    m.impl("unpack_codes", TORCH_BOX(&RowOps<Cuda>::unpack_codes));
    m.impl("unpack_codes.out", TORCH_BOX(&RowOps<Cuda>::unpack_codes_out));
}

}  // namespace ptq4cuda
