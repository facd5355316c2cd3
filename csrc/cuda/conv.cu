// conv2d_integer on CUDA: an implicit matrix product on the tensor cores.
//
// The matrix of weights has a row for each output channel and a column for each (tap, input channel), the matrix of
// codes a column for each output pixel. A block multiplies a strip of 64 rows (4 panels) with 32, 64 or 128 pixels.
// It goes along the columns 64 bytes at a time: three buffers in shared memory, so that two are filled while one is
// multiplied. The matrix of codes exists nowhere: each thread fetches 16 bytes of 2 pixels, knows where their first
// tap lies, and finds the tap by a division; taps outside of the image are zeros.
//
//     shared memory, in 32-bit words of four channels      a warp: 32 outputs x 32 pixels
//     codes    [pixels][16 words + 4]                       8 products of 16 x 32 x 8 for each of 2 steps
//     weights  [4 panels][16 words][16 outputs + 8]
//
// Packed codes stay packed until they are in registers: a chunk of them is half as long. The columns of the high
// nibbles come first; before those of the low nibbles the sums are multiplied by 16. A word of eight nibbles is split
// into the even ones and the odd ones, which are the two words that a lane brings to a product; the words of the
// weights are put into shared memory in the order that matches.
//
// The paddings let the 32 lanes of a warp read 32 different banks. The sums go through shared memory once more, so
// that they are finished and stored channel by channel, as they lie in memory.
//
// Where outputs are so few that their blocks leave multiprocessors idle (one image, late layers), the columns are
// shared out: each block stores its share of the sums, and a second kernel adds up the shares and finishes them.
// Integers have the same sum in any order.
//
// A depthwise convolution has no matrix: a thread sums the taps of a few channels of one pixel.
#include "../conv.h"
#include "mma.cuh"

namespace ptq4cuda {
namespace {

constexpr int kChunk = 16;  // words of a chunk: 64 channels
constexpr int kStages = 3;  // buffers
constexpr int kPanels = 4;  // of a block
constexpr int kOutputs = kPanels * kPanelOutputs;

constexpr int kWeightRow = kPanelOutputs + 8;
constexpr int kWeightWords = kPanels * kChunk * kWeightRow;  // of a buffer
constexpr int kWarpPixels = 32, kWarpOutputs = 32;
constexpr int kSumRow = kOutputs + 4;
constexpr int kVector = 4;       // outputs that a thread finishes together
constexpr int kLeastChunks = 4;  // of a share of the columns: less does not pay for filling the buffers

// kWarps warps along the pixels, two along the outputs.
template <int kWarps, bool packed>
struct Tile {
    static constexpr int pixels = kWarps * kWarpPixels, threads = kWarps * 2 * 32;
    static constexpr int code_words = packed ? kChunk / 2 : kChunk, code_row = code_words + 4;  // of a pixel
    static constexpr int stage_words = pixels * code_row + kWeightWords;
    static constexpr size_t bytes = sizeof(uint32_t) * std::max(kStages * stage_words, pixels* kSumRow + kOutputs);
};

// --- from sums to outputs ------------------------------------------------------------------------------------------

// Where outputs go. Their type is no template parameter: it matters in one place only, and there are enough kernels.
struct Output {
    void* y;
    ScalarType dtype;  // Int: of sums that are not complete, and not finished
    bool aligned;  // kVector outputs, and as many codes of the residual or a second output, are one vector in memory
};

template <class T, int V, class Value>
__device__ __forceinline__ void put(void* to, int64_t at, int count, bool aligned, const Value (&values)[V]) {
    T* y = static_cast<T*>(to) + at;
    Vector<T, V> v;
#pragma unroll
    for (int j = 0; j < V; ++j) v.at[j] = static_cast<T>(values[j]);
    if (count == V) return store<V>(y, v, aligned);
#pragma unroll  // registers have no index at run time
    for (int j = 0; j < V; ++j)
        if (j < count) y[j] = v.at[j];
}

// Stores the codes of four channels packed. The neighbouring thread has the other four of the octet: together they
// store its high nibbles, byte by byte in turn.
__device__ __forceinline__ void put_nibbles(uint8_t* pixel, const Packing& packing, int64_t first, int count,
                                            const int32_t (&codes)[kVector], const Quantizer (&quantizers)[kVector]) {
    uint32_t low = 0, high = 0;
    int bits = 0;  // of the high nibbles
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        if (j >= count) continue;
        low |= (codes[j] & 15) << (4 * j);
        if (quantizers[j].qmax <= 15.0f) continue;
        high |= codes[j] >> 4 << bits;
        bits += 4;
    }
    *reinterpret_cast<uint16_t*>(pixel + first / 2) = static_cast<uint16_t>(low);

    const uint32_t mine = high | bits << 16;
    const uint32_t other = __shfl_xor_sync(3u << (threadIdx.x % 32 & ~1u), mine, 1);
    const bool is_second = first % kOctet != 0;
    const uint32_t before = is_second ? other : mine, after = is_second ? mine : other;
    const uint32_t octet = (before & 0xffff) | (after & 0xffff) << (before >> 16);
    const int32_t begin = packing.begin(first / kOctet), end = packing.end(first / kOctet);
    for (int32_t b = begin + is_second; b < end; b += 2)
        pixel[b] = b - begin < 4 ? static_cast<uint8_t>(octet >> (8 * (b - begin))) : 0;
}

// What the outputs of V neighbouring channels need, kept in registers from pixel to pixel.
template <int V>
struct Channels {
    float scale[V], bias[V];
    Quantizer residual[V], out[V], also[V];
    int count;  // channels that exist

    __device__ Channels(const ConvProblem& problem, int64_t first, int64_t end)
        : count(static_cast<int>(min(end - first, int64_t{V}))) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (j >= count) continue;
            scale[j] = problem.scale[first + j];
            bias[j] = problem.bias[first + j];
            if (problem.residual) residual[j] = problem.residual_quantizer[first + j];
            if (problem.out_quantizer.scale) out[j] = problem.out_quantizer[first + j];
            if (problem.also) also[j] = problem.also_quantizer[first + j];
        }
    }
};

__device__ __forceinline__ bool inside(int i, int size) { return 0 <= i && i < size; }

// The place of an output pixel in the input.
struct Pixel {
    int64_t image;    // of the batch
    int row, column;  // of the first tap, may be negative

    __device__ __forceinline__ Pixel(const ConvShape& s, int64_t index) {
        const int width = static_cast<int>(s.out.width), area = static_cast<int>(s.out.area());
        const int in_image = static_cast<int>(index % area);
        image = index / area;
        row = in_image / width * static_cast<int>(s.stride.height) - static_cast<int>(s.padding.height);
        column = in_image % width * static_cast<int>(s.stride.width) - static_cast<int>(s.padding.width);
    }
};

// Calls f(tap, row, column) for the taps of a pixel that are inside of the image.
template <class F>
__device__ __forceinline__ void for_each_tap(const ConvShape& s, const Pixel& pixel, const F& f) {
    const int height = static_cast<int>(s.in.height), width = static_cast<int>(s.in.width);
    const int down = static_cast<int>(s.dilation.height), right = static_cast<int>(s.dilation.width);
    const int rows = static_cast<int>(s.kernel.height), columns = static_cast<int>(s.kernel.width);
    for (int r = 0, row = pixel.row; r < rows; ++r, row += down)
        for (int c = 0, column = pixel.column; c < columns; ++c, column += right)
            if (inside(row, height) && inside(column, width)) f(r * columns + c, row, column);
}

// Finishes sums of V neighbouring channels of one pixel, from channel `first` on, without the share of zero points.
template <int V>
__device__ __forceinline__ void finish(const ConvProblem& problem, const Channels<V>& of, int64_t pixel,
                                       int64_t first, const int32_t (&sums)[V], const Output& output) {
    const int64_t at = pixel * problem.shape.out_channels + first;
    if (output.dtype == ScalarType::Int) return put<int32_t>(output.y, at, of.count, output.aligned, sums);
    Vector<uint8_t, V> residual{};
    if (problem.residual) {
        if (of.count == V) {
            residual = load<V>(problem.residual + at, output.aligned);
        } else {
#pragma unroll
            for (int j = 0; j < V; ++j)
                if (j < of.count) residual.at[j] = problem.residual[at + j];
        }
    }
    float values[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        values[j] = scaled_sum(sums[j], of.scale[j], of.bias[j]);
        if (problem.residual) values[j] += value(static_cast<float>(residual.at[j]), of.residual[j]);
        values[j] = activated(values[j], problem.activation.negative_slope, problem.activation.upper);
    }
    const auto put_codes = [&](uint8_t* to, const Packing& packing, const Quantizer(&quantizers)[V]) {
        int32_t codes[V];
#pragma unroll
        for (int j = 0; j < V; ++j) codes[j] = int_code(values[j], quantizers[j]);
        if constexpr (V == kVector)
            if (packing.starts)
                return put_nibbles(to + pixel * int64_t{packing.bytes}, packing, first, of.count, codes, quantizers);
        put<uint8_t>(to, at, of.count, output.aligned, codes);
    };
    if (problem.also) put_codes(problem.also, problem.also_packing, of.also);
    using torch::headeronly::BFloat16, torch::headeronly::Half;
    switch (output.dtype) {
        case ScalarType::Byte: return put_codes(static_cast<uint8_t*>(output.y), problem.out_packing, of.out);
        case ScalarType::Half: return put<Half>(output.y, at, of.count, output.aligned, values);
        case ScalarType::BFloat16: return put<BFloat16>(output.y, at, of.count, output.aligned, values);
        default: return put<float>(output.y, at, of.count, output.aligned, values);
    }
}

// Subtracts the share of the zero points: `all` if all taps are inside of the image, else tap by tap.
template <int V>
__device__ __forceinline__ void subtract_zeros(const ConvProblem& problem, int count, int64_t index, int64_t first,
                                               const int32_t* all, int32_t (&sums)[V]) {
    const ConvShape& s = problem.shape;
    const Pixel pixel(s, index);
    const int64_t last_row = pixel.row + (s.kernel.height - 1) * s.dilation.height;
    const int64_t last_column = pixel.column + (s.kernel.width - 1) * s.dilation.width;
    if (pixel.row >= 0 && last_row < s.in.height && pixel.column >= 0 && last_column < s.in.width) {
#pragma unroll
        for (int j = 0; j < V; ++j) sums[j] -= all[j];
        return;
    }
    for_each_tap(s, pixel, [&](int tap, int, int) {
#pragma unroll
        for (int j = 0; j < V; ++j)
            if (j < count) sums[j] -= problem.zero_sums[tap * s.out_channels + first + j];
    });
}

__device__ __forceinline__ int32_t sum_of_zeros(const ConvProblem& problem, int64_t output) {
    int32_t sum = 0;
    for (int64_t tap = 0; tap < problem.shape.kernel.area(); ++tap)
        sum += problem.zero_sums[tap * problem.shape.out_channels + output];
    return sum;
}

// --- the matrix product --------------------------------------------------------------------------------------------

// How a thread fetches codes: 16 bytes at once, words, or single bytes where channels do not fill words.
enum class Fetch { vectors, words, bytes };

// One of the pixels whose codes a thread fetches.
struct Source {
    const uint8_t* image;
    int row, column;  // of the first tap
};

// The columns of one kind of nibbles, or all of them where codes are bytes. They begin with a chunk.
struct Section {
    int words_per_tap, words;  // of codes
    int first_byte;            // of a pixel
    int first_weight;          // word of a panel

    // `words_per_word` words of weights meet a word of codes.
    __device__ int chunks(int words_per_word) const { return (words * words_per_word + kChunk - 1) / kChunk; }
};

// Block `split * tiles + tile` sums share `split` of the columns; of several shares, `output` takes each for itself.
template <int kWarps, Fetch fetch, bool packed>
__global__ void __launch_bounds__(Tile<kWarps, packed>::threads)
    conv_kernel(ConvProblem problem, Output output, int splits) {
    using Shape = Tile<kWarps, packed>;
    constexpr int kThreadsPerRow = Shape::code_words / 4;  // a thread fetches 4 words of each of its pixels
    constexpr int kRows = Shape::pixels * kThreadsPerRow / Shape::threads;
    constexpr int kWordsPerWord = kChunk / Shape::code_words;  // of weights, that meet a word of codes
    uint32_t* shared = dynamic_shared_memory<uint32_t>();
    const ConvShape& s = problem.shape;
    const int thread = threadIdx.x;

    // Which outputs and pixels are this block's.
    const int panels = static_cast<int>(s.panels_per_group()), strips = (panels + kPanels - 1) / kPanels;
    const int groups = static_cast<int>(s.groups), tiles = static_cast<int>(gridDim.x) / splits;
    const int tile = static_cast<int>(blockIdx.x) % tiles, split = static_cast<int>(blockIdx.x) / tiles;
    const int strip = tile % strips, group = tile / strips % groups;
    const int first_panel = group * panels + strip * kPanels, end_panel = (group + 1) * panels;
    const int64_t first_pixel = int64_t{tile / strips / groups} * Shape::pixels;
    const int64_t pixels = s.pixels();
    const int words = static_cast<int>(s.panel_words()), taps = static_cast<int>(s.kernel.area());
    const int high_words = packed ? static_cast<int>(s.high_bytes() / kWordChannels) : 0;
    const int low_words = static_cast<int>(packed ? s.low_bytes / kWordChannels : s.words_per_tap());
    const Section high{high_words, taps * high_words, static_cast<int>(s.low_bytes), 0};
    const Section low{low_words, taps * low_words, 0, high.words * kWordsPerWord};
    const int high_chunks = high.chunks(kWordsPerWord);
    const int height = static_cast<int>(s.in.height), width = static_cast<int>(s.in.width);
    const int down_step = static_cast<int>(s.dilation.height), right_step = static_cast<int>(s.dilation.width);
    const int kernel_width = static_cast<int>(s.kernel.width), pixel_bytes = static_cast<int>(s.pixel_bytes());
    const int channels = static_cast<int>(s.group_channels());

    const int piece = thread % kThreadsPerRow * 4;  // the first of this thread's words in a chunk
    Source sources[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int64_t index = first_pixel + thread / kThreadsPerRow + i * (Shape::pixels / kRows);
        const Pixel pixel(s, min(index, pixels - 1));  // the sums of pixels that do not exist are not stored
        sources[i].image = problem.x + pixel.image * s.in.area() * pixel_bytes + group * channels;
        sources[i].row = pixel.row;
        sources[i].column = pixel.column;
    }

    const auto fetch_chunk = [&](int chunk, uint32_t* stage) {
        const bool is_high = packed && chunk < high_chunks;
        const Section section = is_high ? high : low;
        const int part_of_section = is_high ? chunk : chunk - high_chunks;
        uint32_t* weights = stage + Shape::pixels * Shape::code_row;
        for (int i = thread; i < kPanels * kChunk * 4; i += Shape::threads) {  // 16 bytes: 4 outputs
            const int panel = i / (kChunk * 4), word = i / 4 % kChunk;
            const int column = part_of_section * kChunk + word;
            const bool there = first_panel + panel < end_panel && column < section.words * kWordsPerWord;
            const int64_t from =
                (int64_t{first_panel + panel} * words + section.first_weight + column) * 64 + i % 4 * 16;
            const int place = packed ? word / 8 * 8 + word % 2 * 4 + word % 8 / 2 : word;
            copy_async<16>(weights + (panel * kChunk + place) * kWeightRow + i % 4 * 4,
                           problem.weight + (there ? from : 0), there);
        }
#pragma unroll
        for (int part = 0; part < (fetch == Fetch::vectors ? 1 : 4); ++part) {
            const int word = part_of_section * Shape::code_words + piece + part;
            const int tap = word / section.words_per_tap, in_tap = word % section.words_per_tap;
            const int down = tap / kernel_width * down_step, right = tap % kernel_width * right_step;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const int row = sources[i].row + down, column = sources[i].column + right;
                const bool there = word < section.words && inside(row, height) && inside(column, width);
                const uint8_t* from = sources[i].image;
                if (there)
                    from += int64_t{row * width + column} * pixel_bytes + section.first_byte + in_tap * kWordChannels;
                uint32_t* to =
                    stage + (thread / kThreadsPerRow + i * (Shape::pixels / kRows)) * Shape::code_row + piece + part;
                if constexpr (fetch == Fetch::vectors) {
                    copy_async<16>(to, from, there);
                } else if constexpr (fetch == Fetch::words) {
                    copy_async<4>(to, from, there);
                } else {
                    uint32_t four = 0;
                    for (int b = 0; b < min(kWordChannels, channels - in_tap * kWordChannels) && there; ++b)
                        four |= static_cast<uint32_t>(from[b]) << (8 * b);
                    *to = four;
                }
            }
        }
    };

    const int warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
    const int warp_pixel = warp / 2 * kWarpPixels, warp_panel = warp % 2 * (kWarpOutputs / kPanelOutputs);
    int sums[2][4][4] = {};  // [panel][8 pixels][of this lane]
    const auto multiply_chunk = [&](const uint32_t* stage) {
        const uint32_t* weights = stage + Shape::pixels * Shape::code_row;
#pragma unroll
        for (int step = 0; step < kChunk; step += 8) {
            uint32_t a[2][4], b[4][2];
#pragma unroll
            for (int panel = 0; panel < 2; ++panel)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    a[panel][i] =
                        weights[((warp_panel + panel) * kChunk + step + q + i / 2 * 4) * kWeightRow + g + i % 2 * 8];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const uint32_t* codes = stage + (warp_pixel + n * 8 + g) * Shape::code_row + q;
                if constexpr (packed) {
                    b[n][0] = codes[step / 2] & 0x0f0f0f0f;
                    b[n][1] = codes[step / 2] >> 4 & 0x0f0f0f0f;
                } else {
                    b[n][0] = codes[step];
                    b[n][1] = codes[step + 4];
                }
            }
#pragma unroll
            for (int panel = 0; panel < 2; ++panel)
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply_add(sums[panel][n], a[panel], b[n]);
        }
    };

    const auto count_16_fold = [&] {
#pragma unroll
        for (int panel = 0; panel < 2; ++panel)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[panel][n][i] *= 16;
    };

    const int64_t chunks = high_chunks + low.chunks(kWordsPerWord);
    const int first_chunk = static_cast<int>(chunks * split / splits);
    const int end_chunk = static_cast<int>(chunks * (split + 1) / splits);
    const auto fetch_if_any = [&](int chunk) {
        if (chunk < end_chunk) fetch_chunk(chunk, shared + chunk % kStages * Shape::stage_words);
        end_of_copies();
    };
    for (int i = 0; i < kStages - 1; ++i) fetch_if_any(first_chunk + i);
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this chunk is there, and all threads have done with the one before
        fetch_if_any(chunk + kStages - 1);
        if (packed && chunk == high_chunks) count_16_fold();
        multiply_chunk(shared + chunk % kStages * Shape::stage_words);
    }
    if (packed && end_chunk <= high_chunks) count_16_fold();
    wait_for_copies<0>();
    __syncthreads();

    // The sums by pixel and output.
    int32_t* gathered = reinterpret_cast<int32_t*>(shared);
    int32_t* zeros = gathered + Shape::pixels * kSumRow;  // of all taps
    const int64_t first_output = group * s.group_outputs() + strip * kOutputs;
    const int64_t end_output = (group + 1) * s.group_outputs();
#pragma unroll
    for (int panel = 0; panel < 2; ++panel)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                gathered[(warp_pixel + n * 8 + 2 * q + i % 2) * kSumRow + (warp_panel + panel) * kPanelOutputs + g +
                         i / 2 * 8] = sums[panel][n][i];
    const bool has_zeros = problem.zero_sums && split == 0;
    if (has_zeros)
        for (int o = thread; o < kOutputs; o += Shape::threads)
            zeros[o] = first_output + o < end_output ? sum_of_zeros(problem, first_output + o) : 0;
    __syncthreads();

    constexpr int kThreadsPerPixel = kOutputs / kVector;
    const int mine = thread % kThreadsPerPixel * kVector;
    const Channels<kVector> of(problem, first_output + mine, end_output);
    if (first_output + mine / kOctet * kOctet >= end_output) return;
    for (int p = thread / kThreadsPerPixel; p < Shape::pixels; p += Shape::threads / kThreadsPerPixel) {
        if (first_pixel + p >= pixels) break;
        int32_t four[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) four[j] = gathered[p * kSumRow + mine + j];
        if (has_zeros) subtract_zeros(problem, of.count, first_pixel + p, first_output + mine, zeros + mine, four);
        finish(problem, of, split * pixels + first_pixel + p, first_output + mine, four, output);
    }
}

constexpr int kAddingThreads = 128;

// Threads for the outputs of a pixel: two for each octet.
__host__ __device__ inline int64_t vectors_of_octets(int64_t outputs) {
    return (outputs + kOctet - 1) / kOctet * (kOctet / kVector);
}

// Adds up shares of sums, int32 [splits, N, out H, out W, O], and finishes them.
__global__ void __launch_bounds__(kAddingThreads)
    add_kernel(ConvProblem problem, Output output, const int32_t* shares, int splits) {
    const ConvShape& s = problem.shape;
    const int64_t vectors = vectors_of_octets(s.out_channels), size = s.pixels() * s.out_channels;
    const int64_t index = int64_t{blockIdx.x} * kAddingThreads + threadIdx.x;
    const int64_t first = index % vectors * kVector, pixel = index / vectors;
    if (pixel >= s.pixels()) return;
    int32_t sums[kVector] = {};
    for (int split = 0; split < splits; ++split) {
        const int32_t* share = shares + split * size + pixel * s.out_channels + first;
        if (s.out_channels % kVector == 0 && first < s.out_channels) {
            const Vector<int32_t, kVector> four = load<kVector>(share, true);
#pragma unroll
            for (int j = 0; j < kVector; ++j) sums[j] += four.at[j];
        } else {
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                if (first + j < s.out_channels) sums[j] += share[j];
        }
    }
    finish(problem, Channels<kVector>(problem, first, s.out_channels), pixel, first, sums, output);
}

// --- depthwise -----------------------------------------------------------------------------------------------------

constexpr int kDepthwiseThreads = 128;
constexpr int kDepthwisePixels = 8;  // that a thread does one after the other, with the same parameters

template <int V>
__global__ void __launch_bounds__(kDepthwiseThreads) depthwise_kernel(ConvProblem problem, Output output) {
    const ConvShape& s = problem.shape;
    const int64_t vectors = (s.channels + V - 1) / V, pixels = s.pixels();
    const int64_t index = int64_t{blockIdx.x} * kDepthwiseThreads + threadIdx.x;
    const int64_t first = index % vectors * V, first_pixel = index / vectors * kDepthwisePixels;
    if (first_pixel >= pixels) return;
    const Channels<V> of(problem, first, s.channels);
    int32_t zeros[V] = {};
#pragma unroll
    for (int j = 0; j < V; ++j)
        if (problem.zero_sums && j < of.count) zeros[j] = sum_of_zeros(problem, first + j);

    for (int64_t p = first_pixel; p < min(first_pixel + kDepthwisePixels, pixels); ++p) {
        const Pixel pixel(s, p);
        int32_t sums[V] = {};
        const uint8_t* image = problem.x + pixel.image * s.in.area() * s.channels + first;
        for_each_tap(s, pixel, [&](int tap, int row, int column) {
            const int64_t at = int64_t{row * static_cast<int>(s.in.width) + column} * s.channels;
            const Vector<uint8_t, V> codes = load<V>(image + at, true);
            const Vector<int8_t, V> weights = load<V>(problem.weight + tap * s.channels + first, true);
#pragma unroll
            for (int j = 0; j < V; ++j) sums[j] += codes.at[j] * weights.at[j];
        });
        if (problem.zero_sums) subtract_zeros(problem, of.count, p, first, zeros, sums);
        finish(problem, of, p, first, sums, output);
    }
}

// --- the op --------------------------------------------------------------------------------------------------------

struct Cuda {
    template <class T>
    static void conv(const Tensor& x, const ConvProblem& problem, T* y) {
        const ConvShape& s = problem.shape;
        const int64_t limit = 1 << 30;  // of what is counted in 32 bits
        STD_TORCH_CHECK((s.in.height + 2 * s.padding.height) * (s.in.width + 2 * s.padding.width) < limit &&
                            s.panel_words() < limit && s.groups * s.panels_per_group() < limit,
                        "conv2d_integer: an image of ", s.in.height, " x ", s.in.width, ", a kernel of ",
                        s.kernel.height, " x ", s.kernel.width, " or ", s.out_channels, " outputs are too large");
        constexpr ScalarType dtype = torch::headeronly::CppTypeToScalarType<T>::value;
        const bool aligned = is_aligned<kVector>(y) && is_aligned<kVector>(problem.residual) &&
                             is_aligned<kVector>(problem.also);  // a null pointer is
        const CurrentStream stream(x);
        if (s.depthwise()) {
            depthwise(problem, {y, dtype, s.channels % kVector == 0 && aligned}, stream);
        } else {
            product(x, problem, {y, dtype, s.group_outputs() % kVector == 0 && aligned}, stream);
        }
    }

private:
    static void depthwise(const ConvProblem& problem, const Output& output, const CurrentStream& stream) {
        const ConvShape& s = problem.shape;
        const auto run = [&](auto width) {
            const int64_t threads = ceil_div(s.channels, width) * ceil_div(s.pixels(), kDepthwisePixels);
            start(depthwise_kernel<width>, ceil_div(threads, kDepthwiseThreads), kDepthwiseThreads, 0, stream,
                  problem, output);
        };
        const bool vectors = is_aligned<kVector>(problem.x) && is_aligned<kVector>(problem.weight);
        if (vectors && s.channels % kVector == 0) return run(std::integral_constant<int, kVector>{});
        STD_TORCH_CHECK(!problem.out_packing.starts && !problem.also_packing.starts,
                        "conv2d_integer: codes and weights must be aligned to words where outputs are packed");
        run(std::integral_constant<int, 1>{});
    }

    static void product(const Tensor& x, const ConvProblem& problem, const Output& output,
                        const CurrentStream& stream) {
        STD_TORCH_CHECK(is_aligned<16>(problem.weight), "conv2d_integer: weight must be aligned to 16 bytes");
        const ConvShape& s = problem.shape;
        const auto multiple = [&](int64_t n) {
            const int64_t begins = s.packed() ? std::gcd(s.low_bytes, s.high_bytes()) : s.group_channels();
            return begins % n == 0 && reinterpret_cast<uintptr_t>(problem.x) % n == 0;
        };
        const bool vectors = multiple(16), words = multiple(4);
        if (s.packed()) {
            STD_TORCH_CHECK(words, "conv2d_integer: packed codes must be aligned to words");
            if (vectors) return with_tile<Fetch::vectors, true>(x, problem, output, stream);
            return with_tile<Fetch::words, true>(x, problem, output, stream);
        }
        if (vectors) return with_tile<Fetch::vectors, false>(x, problem, output, stream);
        if (words) return with_tile<Fetch::words, false>(x, problem, output, stream);
        with_tile<Fetch::bytes, false>(x, problem, output, stream);
    }

    // The largest tile that leaves every multiprocessor something to do.
    template <Fetch fetch, bool packed>
    static void with_tile(const Tensor& x, const ConvProblem& problem, const Output& output,
                          const CurrentStream& stream) {
        const ConvShape& s = problem.shape;
        const auto tiles = [&](int64_t pixels) {
            return ceil_div(s.pixels(), pixels) * s.groups * ceil_div(s.panels_per_group(), kPanels);
        };
        const auto run = [&](auto warps, const ConvProblem& part, const Output& to, int64_t splits) {
            using Shape = Tile<warps, packed>;
            start(conv_kernel<warps, fetch, packed>, tiles(Shape::pixels) * splits, Shape::threads, Shape::bytes,
                  stream, part, to, static_cast<int>(splits));
        };
        constexpr std::integral_constant<int, 4> large;
        constexpr std::integral_constant<int, 2> medium;
        constexpr std::integral_constant<int, 1> small;
        const int64_t wanted = 2 * multiprocessors();
        if (tiles(4 * kWarpPixels) >= wanted) return run(large, problem, output, 1);
        if (tiles(2 * kWarpPixels) >= wanted) return run(medium, problem, output, 1);
        const int64_t blocks = tiles(kWarpPixels), most = ceil_div(s.panel_words(), kChunk) / kLeastChunks;
        const int64_t splits = blocks < multiprocessors() ? std::min(wanted / blocks, most) : 1;
        if (splits <= 1) return run(small, problem, output, 1);

        const Tensor workspace = empty_vector(splits * s.pixels() * s.out_channels, ScalarType::Int, x);
        int32_t* shares = workspace.mutable_data_ptr<int32_t>();
        ConvProblem part = problem;  // shares of sums meet no quantizer
        part.residual = nullptr;
        part.also = nullptr;
        part.out_quantizer = {};
        run(small, part, {shares, ScalarType::Int, s.group_outputs() % kVector == 0}, splits);
        const int64_t threads = vectors_of_octets(s.out_channels) * s.pixels();
        start(add_kernel, ceil_div(threads, kAddingThreads), kAddingThreads, 0, stream, problem, output, shares,
              static_cast<int>(splits));
    }

    template <class... Parameters, class... Arguments>
    static void start(void (*kernel)(Parameters...), int64_t grid, int threads, size_t shared_bytes,
                      const CurrentStream& stream, const Arguments&... arguments) {
        STD_TORCH_CHECK(grid <= kMaximumGrid, "conv2d_integer: the output is too large for one launch");
        launch(kernel, grid, threads, shared_bytes, stream, arguments...);
    }
};

}  // namespace

PTQ4CUDA_LIBRARY_IMPL(m) { m.impl("conv2d_integer", TORCH_BOX(&ConvOps<Cuda>::conv2d_integer)); }

}  // namespace ptq4cuda
