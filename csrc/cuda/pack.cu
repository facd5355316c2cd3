// Packed codes on CUDA.
//
// quantize_pack / unpack_dequantize: [N, C, *spatial] <-> [N, *spatial, ceil(C / 2)], two 4-bit codes a byte along
// the channels. Eight channels of a pixel are a 32-bit word.
//   channels_last, C even: the codes of neighbouring values in memory are neighbours in the packed tensor, too. This
//       is elementwise work on groups of eight values and one word (elementwise.cuh).
//   otherwise (NCHW, and an odd C, whose pixels end with half a byte of padding): a tile of pixels by words goes
//       through shared memory. Unpacked values are touched along the pixels, packed words along the channels, so that
//       both sides move whole cache lines.
//
//           one thread: 8 channels x V pixels            shared tile                  packed, one row a pixel
//           c+0  p p+1 ... p+V-1   (16 bytes)            w0    p p+1 p+2 ...          p     w0 w1 w2 w3  (16 bytes)
//           c+1  p p+1 ... p+V-1               --->      w1    p p+1 p+2 ...   --->   p+1   w0 w1 w2 w3
//           ...                                          ...                          ...
//
// pack_codes / unpack_codes: row r holds codes of bits[r] bits, lowest bit first, from byte offsets[r] on. Sixteen
// codes of b bits are exactly 2 b bytes, which is what a thread moves; no byte is shared between threads.
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
constexpr int64_t kTileBlocks = 8;  // at most so many for each multiprocessor; they take several tiles beyond that
constexpr int kTileGap = 4;         // words between the rows of a shared tile
template <int V>
constexpr int kRun = V < 4 ? V : 4;  // neighbouring words of a tile that a thread moves at a time
constexpr int tile_words(int vector) { return kThreads * (vector < 4 ? 4 : vector); }

// Pixels are numbered through all samples: pixel p is pixel p % spatial of sample p / spatial.
struct Tiles {
    int64_t pixels, spatial, channels, bytes;
    int64_t sample_stride, channel_stride, pixel_stride;  // of the unpacked tensor
    int64_t step;                                         // pixels from a block's tile to its next one
    int across;                                           // tiles side by side along the channels
    int log_words;                                        // a tile is 2^log_words words wide
    int access;                                           // bytes of packed pixels that are moved at a time: 16, 4, 1
    bool by_sample;                                       // quantizers along the samples
};

// A block's place: its channels are always the same, its pixels go forward.
template <int V>
struct TileWalk {
    static constexpr int kWords = tile_words(V), kTasks = kWords / V / kThreads;
    const Tiles& tiles;
    int64_t channel, first, sample, rest;  // of the tile; its first pixel is pixel `rest` of `sample`
    int64_t step_samples, step_rest;
    int pitch;  // of the shared tile: words from a channel's word to the next one

    __device__ explicit TileWalk(const Tiles& t)
        : tiles(t),
          channel(int64_t{static_cast<int>(blockIdx.x) % t.across << t.log_words} * kCodes),
          first((blockIdx.x / t.across) * int64_t{kWords >> t.log_words}),
          sample(first / t.spatial),
          rest(first % t.spatial),
          step_samples(t.step / t.spatial),
          step_rest(t.step % t.spatial),
          pitch((kWords >> t.log_words) + kTileGap) {}

    __device__ bool ended() const { return first >= tiles.pixels; }
    __device__ __forceinline__ void advance() {
        first += tiles.step;
        sample += step_samples;
        rest += step_rest;
        if (rest >= tiles.spatial) {
            rest -= tiles.spatial;
            ++sample;
        }
    }

    // What a thread does in its i-th task: V pixels by the eight channels of a word.
    struct Task {
        int place;               // of the first word in the shared tile
        int word;                // of the tile's pixels
        int channels;            // that exist, 0 if the pixels do not
        int64_t sample, offset;  // of the first value in the unpacked tensor
    };
    __device__ __forceinline__ Task task(int i) const {
        const int index = threadIdx.x + i * kThreads;
        const int log_pixels = 31 - __clz(kWords / V) - tiles.log_words;  // pixels / V is a power of two
        const int pixel = (index & ((1 << log_pixels) - 1)) * V, word = index >> log_pixels;
        int64_t in_sample = rest + pixel, n = sample;
        if (tiles.spatial <= kWords) {
            const uint32_t samples = static_cast<uint32_t>(in_sample) / static_cast<uint32_t>(tiles.spatial);
            in_sample -= samples * tiles.spatial;
            n += samples;
        } else if (in_sample >= tiles.spatial) {
            in_sample -= tiles.spatial;
            ++n;
        }
        const int64_t c = channel + word * kCodes, left = max(tiles.channels - c, int64_t{0});
        return {word * pitch + pixel, word,
                first + pixel < tiles.pixels ? static_cast<int>(min(left, int64_t{kCodes})) : 0, n,
                n * tiles.sample_stride + in_sample * tiles.pixel_stride + c * tiles.channel_stride};
    }

    // Calls f(first word in the shared tile, first byte in the packed tensor) for each kCount words of a packed pixel
    // that are this thread's.
    template <int kCount, class F>
    __device__ __forceinline__ void for_each_packed(const F& f) const {
        constexpr int kLog = kCount == 4 ? 2 : 0;
#pragma unroll(kCount == 4 ? 2 : 1)  // single words are rare
        for (int i = 0; i < kWords / kCount / kThreads; ++i) {
            const int index = threadIdx.x + i * kThreads, log_groups = tiles.log_words - kLog;
            const int word = (index & ((1 << log_groups) - 1)) << kLog, pixel = index >> log_groups;
            const int64_t byte = channel / 2 + word * 4;
            if (first + pixel < tiles.pixels && byte < tiles.bytes)
                f(word * pitch + pixel, (first + pixel) * tiles.bytes + byte, tiles.bytes - byte);
        }
    }
};

// The parameters of a tile's channels in shared memory, where each thread has a place of its own for its sample's.
// Right of the last channel its own are repeated: they are the padding's.
template <class Parameters>
class TileParameters {
public:
    __device__ TileParameters(Parameters* shared, const QuantizerTable& table, const Tiles& tiles, int64_t channel)
        : shared_(shared), table_(table), by_sample_(tiles.by_sample) {
        if (by_sample_) return;
        for (int c = threadIdx.x; c < kCodes << tiles.log_words; c += kThreads)
            shared[c] = Parameters(table[min(channel + c, tiles.channels - 1)]);
        __syncthreads();
    }
    // Of the eight channels of a word, one after the other.
    template <class Task, class F>
    __device__ __forceinline__ void for_each(const Task& task, const F& f) const {
        const Parameters* all = shared_ + (by_sample_ ? kTileChannels + threadIdx.x : task.word * kCodes);
        if (by_sample_ && task.channels > 0) shared_[kTileChannels + threadIdx.x] = Parameters(table_[task.sample]);
        const int step = by_sample_ ? 0 : 1;
#pragma unroll
        for (int k = 0; k < kCodes; ++k) f(k, all[k * step]);
    }

private:
    Parameters* shared_;
    const QuantizerTable& table_;
    bool by_sample_;
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    pack_tiles_kernel(const T* x, uint8_t* packed, QuantizerTable table, Tiles tiles) {
    using Walk = TileWalk<V>;
    alignas(16) __shared__ uint32_t tile[Walk::kWords + kTileGap * kTileChannels / kCodes];
    __shared__ Coding shared[kTileChannels + kThreads];

    // Always 4 bits: what is known need not be looked up for each sample. (Wider tiles take no fewer instructions.)
    if constexpr (V == 1) table.bits = nullptr;
    Walk walk(tiles);
    const TileParameters<Coding> parameters(shared, table, tiles, walk.channel);
    for (; !walk.ended(); walk.advance()) {
#pragma unroll
        for (int i = 0; i < Walk::kTasks; ++i) {
            const auto task = walk.task(i);
            Words<V * sizeof(T)> in[kCodes];
            const T* from = x + task.offset;
#pragma unroll
            for (int k = 0; k < kCodes; ++k, from += tiles.channel_stride) {
                in[k] = {};  // the code of 0 is the padding
                if (k < task.channels) in[k] = load_words<V * sizeof(T)>(from);
            }
            uint32_t words[V] = {}, zero_points = 0;
            parameters.for_each(task, [&](int k, const Coding& q) {
                zero_points += q.zero_point() << 4 * k;
#pragma unroll
                for (int j = 0; j < V; ++j)
                    words[j] += static_cast<uint32_t>(q.level(Values<T, V>::get(in[k], j))) << 4 * k;
            });
#pragma unroll
            for (int j = 0; j < V; j += kRun<V>) {
                Vector<uint32_t, kRun<V>> run;
#pragma unroll
                for (int r = 0; r < kRun<V>; ++r) run.at[r] = words[j + r] + zero_points;
                *reinterpret_cast<Vector<uint32_t, kRun<V>>*>(tile + task.place + j) = run;
            }
        }
        __syncthreads();
        if (tiles.access == 16) {
            walk.template for_each_packed<4>([&](int at, int64_t byte, int64_t) {
                Words<16> words;
#pragma unroll
                for (int i = 0; i < 4; ++i) words.at[i] = tile[at + i * walk.pitch];
                store_words(packed + byte, words);
            });
        } else {
            walk.template for_each_packed<1>([&](int at, int64_t byte, int64_t left) {
                if (tiles.access == 4) return store_words(packed + byte, Words<4>{{tile[at]}});
#pragma unroll
                for (int b = 0; b < 4; ++b)
                    if (b < left) packed[byte + b] = static_cast<uint8_t>(tile[at] >> 8 * b);
            });
        }
        __syncthreads();  // the tile is read before the next one overwrites it
    }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    unpack_tiles_kernel(const uint8_t* packed, T* x, QuantizerTable table, Tiles tiles) {
    using Walk = TileWalk<V>;
    alignas(16) __shared__ uint32_t tile[Walk::kWords + kTileGap * kTileChannels / kCodes];
    __shared__ Decoding shared[kTileChannels + kThreads];

    Walk walk(tiles);
    const TileParameters<Decoding> parameters(shared, table, tiles, walk.channel);
    for (; !walk.ended(); walk.advance()) {
        if (tiles.access == 16) {
            walk.template for_each_packed<4>([&](int at, int64_t byte, int64_t) {
                const Words<16> words = load_words<16>(packed + byte);
#pragma unroll
                for (int i = 0; i < 4; ++i) tile[at + i * walk.pitch] = words.at[i];
            });
        } else {
            walk.template for_each_packed<1>([&](int at, int64_t byte, int64_t left) {
                uint32_t word = 0;
                if (tiles.access == 4) {
                    word = load_words<4>(packed + byte).at[0];
                } else {
#pragma unroll
                    for (int b = 0; b < 4; ++b)
                        if (b < left) word |= uint32_t{packed[byte + b]} << 8 * b;
                }
                tile[at] = word;
            });
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Walk::kTasks; ++i) {
            const auto task = walk.task(i);
            uint32_t even[V], odd[V];
#pragma unroll
            for (int j = 0; j < V; j += kRun<V>) {
                const auto run = *reinterpret_cast<const Vector<uint32_t, kRun<V>>*>(tile + task.place + j);
#pragma unroll
                for (int r = 0; r < kRun<V>; ++r) {
                    const Nibbles nibbles(run.at[r]);
                    even[j + r] = nibbles.even;
                    odd[j + r] = nibbles.odd;
                }
            }
            T* to = x + task.offset;
            parameters.for_each(task, [&](int k, const Decoding& q) {
                const auto words = Values<T, V>::make([&](int j) { return q(Nibbles(even[j], odd[j]).bits(k)); });
                store_words(to, words, k < task.channels);
                to += tiles.channel_stride;
            });
        }
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
    const int64_t words = ceil_div(tiles.bytes, 4);
    tiles.log_words = 0;
    while (1 << tiles.log_words < words && 1 << tiles.log_words < kTileChannels / kCodes) ++tiles.log_words;
    const auto multiple = [&](int n) {
        return tiles.bytes % n == 0 && reinterpret_cast<uintptr_t>(packed) % n == 0 && 4 << tiles.log_words >= n;
    };
    tiles.access = multiple(16) ? 16 : multiple(4) ? 4 : 1;
    const int64_t across = ceil_div(words, 1 << tiles.log_words);
    STD_TORCH_CHECK(across <= kMaximumGrid, layout.channels, " channels are too many for one launch");
    tiles.across = static_cast<int>(across);
    with_vector_width(x, layout.channels_last ? 1 : layout.spatial, [&](auto width) {
        const int64_t tile_pixels = tile_words(width) >> tiles.log_words;
        const int64_t down = std::min(ceil_div(tiles.pixels, tile_pixels),
                                      std::max<int64_t>(multiprocessors() * kTileBlocks / across, 1));
        tiles.step = down * tile_pixels;
        run(width, tiles, across * down);
    });
}

// --- rows of any bit-width ---------------------------------------------------------------------------------------

constexpr int kRowCodes = 16;  // that a thread moves at a time: twice as many bytes as a code has bits, packed

// The rows of a table as work for a grid: a thread goes `step` pieces of kRowCodes codes further each time.
struct RowWork {
    RowTable table;
    int64_t pieces;  // of a row
    int64_t step_rows, step_pieces;
    bool aligned;  // 16 codes are one vector
};

// Calls f(row's bits, first of its codes, its packed bytes, codes there are, at most kRowCodes) for the work of one
// thread. A row that would leave the packed buffer is taken for one of 0 bits, which has no bytes: the table lies on
// the device, where nobody can raise an error.
template <class Codes, class Packed, class F>
__device__ __forceinline__ void for_each_piece(const RowWork& work, Codes* codes, Packed* packed, const F& f) {
    const RowTable& table = work.table;
    const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    int64_t row = first / work.pieces, piece = first % work.pieces;
    while (row < table.rows) {
        const int bits = table.holds(row) ? table.bits[row] : 0;
        const int64_t code = piece * kRowCodes;
        f(bits, codes + row * table.length + code, packed + table.offsets[row] + piece * 2 * bits,
          static_cast<int>(min(table.length - code, int64_t{kRowCodes})));
        row += work.step_rows;
        piece += work.step_pieces;
        if (piece >= work.pieces) {
            piece -= work.pieces;
            ++row;
        }
    }
}

// Four codes, a byte each, to neighbouring bits, and back. First two codes of a half word come together, then two
// halves.
__device__ __forceinline__ uint32_t squeeze(uint32_t bytes, int bits) {
    bytes &= ((1u << bits) - 1) * 0x01010101;
    const uint32_t pairs = (bytes & 0x00ff00ff) | (bytes >> 8 & 0x00ff00ff) << bits;
    return (pairs & 0xffff) | pairs >> 16 << 2 * bits;
}
__device__ __forceinline__ uint32_t spread(uint32_t codes, int bits) {
    const uint32_t two = (1u << 2 * bits) - 1, one = ((1u << bits) - 1) * 0x00010001;
    const uint32_t pairs = (codes & two) | (codes >> 2 * bits & two) << 16;
    return (pairs & one) | (pairs >> bits & one) << 8;
}

// Calls f(std::integral_constant<int, n>) if the packed bytes of a whole piece are n = 16, 8, 4 or 2 and aligned.
template <class F>
__device__ __forceinline__ bool with_whole_piece(int bits, const uint8_t* packed, const F& f) {
    if (reinterpret_cast<uintptr_t>(packed) % (2 * max(bits, 1)) != 0) return false;
    if (bits == 8) return f(std::integral_constant<int, 16>{}), true;
    if (bits == 4) return f(std::integral_constant<int, 8>{}), true;
    if (bits == 2) return f(std::integral_constant<int, 4>{}), true;
    if (bits == 1) return f(std::integral_constant<int, 2>{}), true;
    return false;
}

__global__ void __launch_bounds__(kThreads) pack_rows_kernel(const uint8_t* codes, uint8_t* packed, RowWork work) {
    for_each_piece(work, codes, packed, [&](int bits, const uint8_t* from, uint8_t* to, int count) {
        Words<16> in{};
        if (count == kRowCodes && work.aligned) {
            in = load_words<16>(from);
        } else {
#pragma unroll
            for (int k = 0; k < kRowCodes; ++k)
                if (k < count) in.at[k / 4] |= uint32_t{from[k]} << 8 * (k % 4);
        }
        // Two streams of eight codes, `bits` bytes each.
        uint64_t streams[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            streams[i] = squeeze(in.at[2 * i], bits) | uint64_t{squeeze(in.at[2 * i + 1], bits)} << 4 * bits;
        const auto store_whole = [&](auto size) {
            Words<size> out;
            const uint64_t low = size == 16 ? streams[0] : streams[0] | streams[1] << 4 * size;
            out.at[0] = static_cast<uint32_t>(low);
            if constexpr (size >= 8) out.at[1] = static_cast<uint32_t>(low >> 32);
            if constexpr (size == 16) {
                out.at[2] = static_cast<uint32_t>(streams[1]);
                out.at[3] = static_cast<uint32_t>(streams[1] >> 32);
            }
            store_words(to, out);
        };
        if (count == kRowCodes && with_whole_piece(bits, to, store_whole)) return;
        const int bytes = (count * bits + 7) / 8;
#pragma unroll
        for (int b = 0; b < kRowCodes; ++b)
            if (b < bytes)
                to[b] = static_cast<uint8_t>(b < bits ? streams[0] >> 8 * b : streams[1] >> 8 * (b - bits));
    });
}

__global__ void __launch_bounds__(kThreads) unpack_rows_kernel(const uint8_t* packed, uint8_t* codes, RowWork work) {
    for_each_piece(work, codes, packed, [&](int bits, uint8_t* to, const uint8_t* from, int count) {
        uint64_t streams[2] = {};
        const auto load_whole = [&](auto size) {
            const Words<size> in = load_words<size>(from);
            if constexpr (size == 16) {
                streams[0] = in.at[0] | uint64_t{in.at[1]} << 32;
                streams[1] = in.at[2] | uint64_t{in.at[3]} << 32;
            } else {
                uint64_t both = in.at[0];
                if constexpr (size == 8) both |= uint64_t{in.at[1]} << 32;
                streams[0] = both;
                streams[1] = both >> 4 * size;
            }
        };
        if (count < kRowCodes || !with_whole_piece(bits, from, load_whole)) {
            const int bytes = (count * bits + 7) / 8;
#pragma unroll
            for (int b = 0; b < kRowCodes; ++b)
                if (b < bytes)
                    (b < bits ? streams[0] : streams[1]) |= uint64_t{from[b]} << 8 * (b < bits ? b : b - bits);
        }
        Words<16> out;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            out.at[2 * i] = spread(static_cast<uint32_t>(streams[i]), bits);
            out.at[2 * i + 1] = spread(static_cast<uint32_t>(streams[i] >> 4 * bits), bits);
        }
        if (count == kRowCodes && work.aligned) return store_words(to, out);
#pragma unroll
        for (int k = 0; k < kRowCodes; ++k)
            if (k < count) to[k] = static_cast<uint8_t>(out.at[k / 4] >> 8 * (k % 4));
    });
}

// Calls run(work, grid).
template <class F>
void with_row_work(const RowTable& table, const uint8_t* codes, const F& run) {
    RowWork work;
    work.table = table;
    work.pieces = ceil_div(table.length, kRowCodes);
    work.aligned = table.length % kRowCodes == 0 && is_aligned<kRowCodes>(codes);
    const int64_t grid =
        std::min(multiprocessors() * kBlocksPerMultiprocessor, ceil_div(table.rows * work.pieces, kThreads));
    work.step_rows = grid * kThreads / work.pieces;
    work.step_pieces = grid * kThreads % work.pieces;
    run(work, grid);
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
        const uint8_t* from = codes.const_data_ptr<uint8_t>();
        with_row_work(table, from, [&](const RowWork& work, int64_t grid) {
            launch(pack_rows_kernel, grid, kThreads, 0, stream, from, to, work);
        });
    }

    static void unpack_rows(const Tensor& packed, const Tensor& codes, const RowTable& table) {
        if (codes.numel() == 0) return;
        const CurrentStream stream(codes);
        uint8_t* to = codes.mutable_data_ptr<uint8_t>();
        with_row_work(table, to, [&](const RowWork& work, int64_t grid) {
            launch(unpack_rows_kernel, grid, kThreads, 0, stream, packed.const_data_ptr<uint8_t>(), to, work);
        });
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
