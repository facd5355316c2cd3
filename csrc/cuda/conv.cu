// conv2d_integer on CUDA: an implicit matrix product on the tensor cores.
//
// The matrix of weights has a row for each output channel and a column for each (tap, input channel), the matrix of
// codes a column for each output pixel. A warp multiplies 64 rows (a strip, 4 panels) with 32 pixels, a block has one
// or two strips and up to 128 pixels. It goes along the columns 64 at a time: three buffers in shared memory, so that
// two are filled while one is multiplied. The matrix of codes exists nowhere: each thread fetches pieces of the same
// few pixels, of one tap after the other; it carries the place of the tap along, as digits with carry. Taps outside
// of the image are zeros.
//
//     shared memory    codes    [pixels][64 bytes, packed 32]
//                      weights  [panels][16 words][16 outputs]
//
// in units of 16 bytes, in an order within each row that lets all readers of a warp find different banks (place_of).
// Packed codes stay packed until they are in registers. The columns of the high nibbles come first; before those of
// the low nibbles the sums are multiplied by 16. A word of eight nibbles is split into the even ones and the odd
// ones, which are the two words that a lane brings to a product; the words of the weights are put into shared memory
// in the order that matches.
//
// Which rows of a product are which outputs is free. Lane 4 g + q takes the outputs 8 g to 8 g + 7 of the strip: that
// is how 16 bytes of weights at a time become the operands of four products, and why a thread ends with the sums of a
// whole octet of outputs of 8 pixels, which it can finish and store by itself (conv_finish.cuh).
//
// Where blocks would leave multiprocessors idle, the columns are shared out (conv_plan.h): each block stores its
// share of the sums, and a second kernel adds up the shares and finishes them. Integers have the same sum in any
// order.
//
// Where channels do not fill 16 bytes, words are fetched one by one. They are copied first where channels do not fill
// words, as those of an image, or where there is padding: each pixel filled up to words, zeros around each image. So
// there is no need to ask for each word whether it is inside of the image.
//
// A depthwise convolution has no matrix: a thread sums the taps of an octet of channels of a few pixels.
#include "../conv.h"
#include "../conv_plan.h"
#include "conv_finish.cuh"
#include "mma.cuh"

namespace ptq4cuda {
namespace {

constexpr int kChunk = 16;                                           // words of weights in a chunk: 64 columns
constexpr int kStages = 3;                                           // buffers
constexpr int kPanelBytes = kChunk * kPanelOutputs * kWordChannels;  // of a chunk
constexpr int kWarpPixels = 32;
constexpr int kVector = 16, kWord = kWordChannels;  // bytes that a copy moves

template <int kStrips, int kPixelWarps, int kUnit, bool packed>
struct Tile {
    static constexpr int outputs = kStrips * kStrip, pixels = kPixelWarps * kWarpPixels;
    static constexpr int warps = kStrips * kPixelWarps, threads = 32 * warps;
    static constexpr int row_bytes = packed ? 32 : 64;  // of a pixel in a chunk
    static constexpr int code_bytes = pixels * row_bytes;
    static constexpr int stage_bytes = code_bytes + outputs / kPanelOutputs * kPanelBytes;
    static constexpr size_t bytes = kStages * stage_bytes + kStrips * sizeof(Constants);
    static constexpr int resident = 512 / threads;  // blocks on a multiprocessor: a thread has 128 registers
    static_assert(bytes <= (64 << 10), "more shared memory than the smallest GPU has");
};

// --- columns -------------------------------------------------------------------------------------------------------

// How far a piece of a pixel moves: in its tap, and which tap that is.
struct Step {
    int unit, right, down;  // units; the tap, in pixels of the image
    int bytes;              // in memory
};

// The columns of one kind of nibbles, or all of them where codes are bytes. They begin with a chunk. A unit is what a
// copy moves, a piece the 16 bytes that a thread fetches of a pixel, of one unit or four.
struct Section {
    FastDivisor units;  // of a tap
    int chunks;
    int first_byte;  // of a pixel
    int first_word;  // of a panel
    Step chunk;      // a chunk further
    int next_tap;    // bytes, from behind the units of a tap to the next tap
};

// What conv_kernel and add_kernel know of a matrix product.
struct Product {
    Window window;
    Section high, low;
    FastDivisor tiles, strips, groups;  // blocks of a share, strips of a group as wide as a tile
    FastDivisor kernel_columns;
    int right_end, down_end;  // taps end here, in pixels
    int next_row;             // bytes from behind a row of taps to the next row
    int group_bytes;          // of a pixel: the channels of a group
    int panels, group_outputs;
    int panel_words;
    FastDivisor splits;
    int share_outputs;   // of a group in a share: whole octets
    int64_t share_sums;  // of a share
};

// Where a thread is along the columns of a section.
struct Walk {
    int unit, right, down;
    int bytes;  // from the first tap of a pixel
    int left;   // units to the end of the section
    int units, next_tap;
    Step chunk;

    // `begin` units, each of `size` bytes, behind the first column.
    __device__ __forceinline__ Walk(const Product& product, const Section& section, int begin, int size)
        : units(static_cast<int>(section.units.divisor)), next_tap(section.next_tap), chunk(section.chunk) {
        const int tap = section.units.quotient(begin), row = product.kernel_columns.quotient(tap);
        unit = section.units.remainder(begin, tap);
        right = product.kernel_columns.remainder(tap, row) * product.window.right_step;
        down = row * product.window.down_step;
        left = units * product.window.rows * product.window.columns - begin;
        bytes = (down * product.window.pitch + right) * product.window.pixel_bytes + section.first_byte + unit * size;
    }
    // Goes on by `count` units, which are `step`.
    __device__ __forceinline__ void advance(const Product& product, const Step& step, int count) {
        left -= count;
        unit += step.unit;
        right += step.right;
        down += step.down;
        bytes += step.bytes;
        if (unit >= units) {
            unit -= units;
            right += product.window.right_step;
            bytes += next_tap;
        }
        if (right >= product.right_end) {
            right -= product.right_end;
            down += product.window.down_step;
            bytes += product.next_row;
        }
    }
};

// --- the matrix product --------------------------------------------------------------------------------------------

// Block `split * tiles + tile` sums share `split` of the columns; of several shares, `output` takes each for itself.
template <int kStrips, int kPixelWarps, int kUnit, bool packed>
__global__ void __launch_bounds__(Tile<kStrips, kPixelWarps, kUnit, packed>::threads,
                                  Tile<kStrips, kPixelWarps, kUnit, packed>::resident)
    conv_kernel(const __grid_constant__ ConvProblem problem, const __grid_constant__ Output output,
                const __grid_constant__ Product product) {
    using Shape = Tile<kStrips, kPixelWarps, kUnit, packed>;
    constexpr int kPieces = Shape::row_bytes / kVector;               // of a pixel in a chunk
    constexpr int kPieceStep = Shape::threads / kPieces;              // pixels from a thread's one to its next one
    constexpr int kRows = Shape::pixels / kPieceStep;                 // pixels of a thread
    constexpr int kParts = kVector / kUnit;                           // copies of a piece
    constexpr int kWeightRows = Shape::outputs * 4 / Shape::threads;  // pieces of weights of a thread
    Constants* constants = dynamic_shared_memory<Constants>();
    const SharedAddress buffers = shared_address(constants + kStrips);
    const Window& window = product.window;
    const int thread = threadIdx.x;

    // Which outputs and pixels are this block's.
    const int block = static_cast<int>(blockIdx.x), split = product.tiles.quotient(block);
    const int tile = product.tiles.remainder(block, split), strips = product.strips.quotient(tile);
    const int strip = product.strips.remainder(tile, strips), pixel_tile = product.groups.quotient(strips);
    const int group = product.groups.remainder(strips, pixel_tile);
    const int first_pixel = pixel_tile * Shape::pixels;
    const int first_output = strip * Shape::outputs;  // of the group

    // Which columns.
    const int high_chunks = packed ? product.high.chunks : 0, chunks = high_chunks + product.low.chunks;
    const int first_chunk = product.splits.quotient(chunks * split);
    const int end_chunk = product.splits.quotient(chunks * split + chunks);

    // What this thread fetches: the same words of several panels, the same piece of several pixels.
    const int panel = thread / 64, word = thread % 64 / 4;
    const int64_t panel_step = int64_t{product.panel_words} * kPanelOutputs * kWordChannels;
    const int8_t* weights = problem.weight +
                            (int64_t{group} * product.panels + first_output / kPanelOutputs + panel) * panel_step +
                            thread % 64 * kVector;
    const int panels_left = product.panels - first_output / kPanelOutputs - panel;
    // Of words 8 step + {q, q + 4}, of packed codes {2 q, 2 q + 1}, outputs 2 t and 2 t + 1 of an octet are together.
    const int word_q = packed ? word % 8 / 2 : word % 4, word_half = packed ? word % 2 : word % 8 / 4;
    const int weights_to = Shape::code_bytes + panel * kPanelBytes + word / 8 * 512 + thread % 2 * 256 +
                           thread % 4 / 2 * 64 + word_q * kVector + word_half * 8;
    const int piece = thread % kPieces, row = thread / kPieces;
    const int codes_to = row * Shape::row_bytes + (piece ^ (packed ? row >> 2 & 1 : row >> 1 & 3)) * kVector;
    const uint8_t* first_tap[kRows];
    int pixel_row[kRows], pixel_column[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        // The sums of pixels that do not exist are not stored.
        const Pixel pixel(window, min(first_pixel + row + i * kPieceStep, window.pixels - 1));
        first_tap[i] = pixel.first_tap(problem.x, window) + group * product.group_bytes;
        pixel_row[i] = pixel.row;
        pixel_column[i] = pixel.column;
    }

    // Where it is along the columns.
    int fetched = first_chunk;  // chunks that are or will be there
    const bool begins_high = packed && first_chunk < high_chunks;
    const int in_section = begins_high ? first_chunk : first_chunk - high_chunks;
    const Section& begin = begins_high ? product.high : product.low;
    Walk walk(product, begin, (in_section * kPieces + piece) * kParts, kUnit);
    int words_left = product.panel_words - word - begin.first_word - in_section * kChunk;
    weights += int64_t{begin.first_word + in_section * kChunk} * (kPanelOutputs * kWordChannels);
    const auto fetch = [&](SharedAddress stage) {
        if (fetched < end_chunk) {
            if (packed && fetched == high_chunks) {
                walk = Walk(product, product.low, piece * kParts, kUnit);
                const int left = product.panel_words - word - product.low.first_word;
                weights += int64_t{words_left - left} * (kPanelOutputs * kWordChannels);
                words_left = left;
            }
            const int8_t* from = weights;
#pragma unroll
            for (int k = 0; k < kWeightRows; ++k) {
                // Fewer than 64 threads take half of a panel's words at a time.
                const int more_panels = k * Shape::threads / 64, more_words = k * Shape::threads % 64 / 4;
                if (k > 0 && more_words == 0)
                    from = worked_out(from + (Shape::threads < 64 ? 1 : Shape::threads / 64) * panel_step);
                const bool there = panels_left > more_panels && words_left > more_words;
                const SharedAddress to = stage + weights_to + more_panels * kPanelBytes + more_words * 64;
                copy_async<8>(to, from + more_words * 64, there);
                copy_async<8>(to + 128, from + more_words * 64 + 8, there);
            }
            Walk at = walk;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                if (part > 0) at.advance(product, {1, 0, 0, kUnit}, 1);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    const bool there = kUnit == kWord ? at.left > 0
                                                      : at.down < product.down_end &&
                                                            inside(pixel_row[i] + at.down, window.height_in) &&
                                                            inside(pixel_column[i] + at.right, window.width_in);
                    copy_async<kUnit>(stage + codes_to + i * (kPieceStep * Shape::row_bytes) + part * kUnit,
                                      first_tap[i] + at.bytes, there);
                }
            }
            walk.advance(product, walk.chunk, kPieces * kParts);
            weights += kPanelBytes;
            words_left -= kChunk;
            ++fetched;
        }
        end_of_copies();
    };

    // What this lane multiplies: outputs 8 g to 8 g + 7 of a strip, words q and q + 4 of each half of a chunk.
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
    const int warp_strip = warp % kStrips, warp_pixel = warp / kStrips * kWarpPixels;
    const int weights_from =
        Shape::code_bytes + (warp_strip * (kStrip / kPanelOutputs) + g / 2) * kPanelBytes + g % 2 * 64 + q * kVector;
    const int codes_from = packed ? (warp_pixel + lane) * Shape::row_bytes + (lane >> 2 & 1) * kVector
                                  : (warp_pixel + lane / 16 * 8 + lane % 8) * Shape::row_bytes +
                                        (lane / 8 % 2 ^ (lane >> 1 & 3)) * kVector;
    int sums[4][4][4] = {};  // [rows][8 pixels][of this lane]
    const auto multiply = [&](SharedAddress stage) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            uint32_t a[4][4], b[4][2];
#pragma unroll
            for (int m = 0; m < 4; ++m) load_shared(a[m], stage + weights_from + step * 512 + m * 128);
            if constexpr (packed) {
                uint32_t words[4];
                load_matrices(words, stage + (codes_from ^ step * kVector));
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    b[n][0] = words[n] & 0x0f0f0f0f;
                    b[n][1] = words[n] >> 4 & 0x0f0f0f0f;
                }
            } else {
#pragma unroll
                for (int n = 0; n < 4; n += 2) {
                    uint32_t words[4];
                    load_matrices(words, stage + (codes_from ^ step * 2 * kVector) + n * 8 * Shape::row_bytes);
#pragma unroll
                    for (int i = 0; i < 4; ++i) b[n + i / 2][i % 2] = words[i];
                }
            }
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply_add(sums[m][n], a[m], b[n]);
        }
    };
    const auto count_16_fold = [&] {
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] *= 16;
    };

    for (int i = 0; i < kStages - 1; ++i) fetch(buffers + i * Shape::stage_bytes);
    const bool has_zeros = problem.zero_sums && split == 0, is_share = output.dtype == ScalarType::Int;
    const int group_output = group * product.group_outputs;
    if (!is_share || has_zeros)
        prepare<Shape::threads, kStrips>(problem, output, has_zeros, group_output + first_output,
                                         group_output + product.group_outputs, constants);
    const SharedAddress last = buffers + (kStages - 1) * Shape::stage_bytes;
    SharedAddress from = buffers, to = last;
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this chunk is there, and all threads have done with the one before
        fetch(to);
        if (packed && chunk == high_chunks) count_16_fold();
        multiply(from);
        to = from;
        from = from == last ? buffers : from + Shape::stage_bytes;
    }
    if (packed && end_chunk <= high_chunks) count_16_fold();

    const int octet = g, mine = first_output + warp_strip * kStrip + octet * kOctet;
    const int count = product.group_outputs - mine, pixel = first_pixel + warp_pixel + 2 * q;
    const auto sum = [&](int j, int p) -> int& { return sums[j / 2][p / 2][j % 2 * 2 + p % 2]; };
    const auto place = [](int p) { return p / 2 * 8 + p % 2; };
    constexpr int kPixels = kWarpPixels / 4;
    if (has_zeros)
        subtract_zeros<kPixels>(problem, window, constants[warp_strip], octet, pixel, group_output + mine, count, sum,
                                place);
    if (!is_share)
        return finish<kPixels>(problem, output, constants[warp_strip], octet, pixel, window.pixels,
                               group_output + mine, count, sum, place);
    if (count <= 0) return;
    int32_t* share =
        static_cast<int32_t*>(output.y) + split * product.share_sums + group * product.share_outputs + mine;
    const int share_row = product.share_outputs * static_cast<int>(product.groups.divisor);
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
        if (pixel + place(p) >= window.pixels) continue;
#pragma unroll
        for (int j = 0; j < kOctet; j += 4) {
            const Vector<int32_t, 4> four{{sum(j, p), sum(j + 1, p), sum(j + 2, p), sum(j + 3, p)}};
            store<4>(share + int64_t{pixel + place(p)} * share_row + j, four, true);
        }
    }
}

// --- kernels without a matrix --------------------------------------------------------------------------------------

// A block takes a strip of channels of some pixels; a thread an octet of kPixels of them.
constexpr int kStripThreads = 128, kStripPixels = 4;
constexpr int kPixelStep = kStripThreads / kOctets;  // pixels from a thread's one to its next one

struct Strips {
    FastDivisor strips, groups;  // strips of a group
    int group_outputs;

    Strips(int64_t outputs, int64_t groups_)
        : strips(ceil_div(outputs, kStrip)), groups(groups_), group_outputs(static_cast<int>(outputs)) {}
    int64_t blocks(int64_t pixels) const {
        return int64_t{strips.divisor} * groups.divisor * ceil_div(pixels, kPixelStep * kStripPixels);
    }
};

// What a thread of such a block does.
struct StripThread {
    int octet, group, output, pixel;  // `output` within the group

    __device__ __forceinline__ explicit StripThread(const Strips& strips) {
        const int block = static_cast<int>(blockIdx.x), rest = strips.strips.quotient(block);
        const int part = strips.groups.quotient(rest);
        group = strips.groups.remainder(rest, part);
        octet = threadIdx.x % kOctets;
        output = strips.strips.remainder(block, rest) * kStrip + octet * kOctet;
        pixel = part * (kPixelStep * kStripPixels) + threadIdx.x / kOctets;
    }
};

// Adds up shares of sums and finishes them. They have whole octets of outputs.
__global__ void __launch_bounds__(kStripThreads, 6)
    add_kernel(const __grid_constant__ ConvProblem problem, const __grid_constant__ Output output,
               const __grid_constant__ Product product, const __grid_constant__ Strips strips,
               const int32_t* shares) {
    __shared__ Constants constants;
    const StripThread my(strips);
    const int first = my.group * strips.group_outputs;
    prepare<kStripThreads, 1>(problem, output, false, first + my.output - my.octet * kOctet,
                              first + strips.group_outputs, &constants);
    __syncthreads();
    int sums[kOctet][kStripPixels] = {};
    if (my.output >= strips.group_outputs) return;
    const int share_row = product.share_outputs * static_cast<int>(strips.groups.divisor);
    const int32_t* share = shares + my.group * product.share_outputs + my.output;
    for (int split = 0; split < static_cast<int>(product.splits.divisor); ++split, share += product.share_sums)
#pragma unroll
        for (int p = 0; p < kStripPixels; ++p) {
            const int32_t* of_pixel =
                row_of(share, min(my.pixel + p * kPixelStep, product.window.pixels - 1), share_row);
#pragma unroll
            for (int j = 0; j < kOctet; j += 4) {
                const Vector<int32_t, 4> four = load<4>(of_pixel + j, true);
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[j + i][p] += four.at[i];
            }
        }
    finish<kStripPixels>(
        problem, output, constants, my.octet, my.pixel, product.window.pixels, first + my.output,
        strips.group_outputs - my.output, [&](int j, int p) -> int& { return sums[j][p]; },
        [](int p) { return p * kPixelStep; });
}

// An octet of bytes; the first `count` of them where they are not whole and aligned.
template <bool kVectors>
__device__ __forceinline__ Vector<uint32_t, 2> load_octet(const void* from, int count) {
    if constexpr (kVectors) {
        return load<2>(static_cast<const uint32_t*>(from), true);
    } else {
        Vector<uint32_t, 2> words{};
#pragma unroll
        for (int j = 0; j < kOctet; ++j)
            if (j < count)
                words.at[j / 4] |= static_cast<uint32_t>(static_cast<const uint8_t*>(from)[j]) << j % 4 * 8;
        return words;
    }
}

template <bool kVectors>
__global__ void __launch_bounds__(kStripThreads)
    depthwise_kernel(const __grid_constant__ ConvProblem problem, const __grid_constant__ Output output,
                     const __grid_constant__ Window window, const __grid_constant__ Strips strips) {
    __shared__ Constants constants;
    const StripThread my(strips);
    const bool has_zeros = problem.zero_sums;
    prepare<kStripThreads, 1>(problem, output, has_zeros, my.output - my.octet * kOctet, strips.group_outputs,
                              &constants);
    __syncthreads();
    const int channels = strips.group_outputs, count = channels - my.output;
    if (count <= 0 || my.pixel >= window.pixels) return;

    const uint8_t* first_tap[kStripPixels];
    int rows[kStripPixels], columns[kStripPixels];
#pragma unroll
    for (int p = 0; p < kStripPixels; ++p) {
        const Pixel pixel(window, min(my.pixel + p * kPixelStep, window.pixels - 1));
        first_tap[p] = pixel.first_tap(problem.x, window) + my.output;
        rows[p] = pixel.row;
        columns[p] = pixel.column;
    }
    int sums[kOctet][kStripPixels] = {};
    const int8_t* weight = problem.weight + my.output;
    for (int r = 0, down = 0; r < window.rows; ++r, down += window.down_step)
        for (int c = 0, right = 0; c < window.columns; ++c, right += window.right_step, weight += channels) {
            const Vector<uint32_t, 2> weights = load_octet<kVectors>(weight, count);
            const int bytes = (down * window.pitch + right) * channels;
            Vector<uint32_t, 2> codes[kStripPixels] = {};
#pragma unroll
            for (int p = 0; p < kStripPixels; ++p)
                if (inside(rows[p] + down, window.height_in) && inside(columns[p] + right, window.width_in))
                    codes[p] = load_octet<kVectors>(first_tap[p] + bytes, count);
#pragma unroll
            for (int j = 0; j < kOctet; ++j)  // a product of four bytes with one that is not zero
#pragma unroll
                for (int p = 0; p < kStripPixels; ++p)
                    sums[j][p] = dot(codes[p].at[j / 4], weights.at[j / 4] & 0xffu << j % 4 * 8, sums[j][p]);
        }
    const auto sum = [&](int j, int p) -> int& { return sums[j][p]; };
    const auto place = [](int p) { return p * kPixelStep; };
    if (has_zeros)
        subtract_zeros<kStripPixels>(problem, window, constants, my.octet, my.pixel, my.output, count, sum, place);
    finish<kStripPixels>(problem, output, constants, my.octet, my.pixel, window.pixels, my.output, count, sum, place);
}

constexpr int kFillThreads = 128;

// Copies images of groups of `channels` bytes so that each group begins with a word, and is filled up with zeros, and
// zeros are around each image. `area` and `pitch` are pixels of an image and of a row in the copy.
__global__ void __launch_bounds__(kFillThreads)
    fill_words_kernel(const uint8_t* x, uint32_t* words, const __grid_constant__ Window window, int64_t pixels,
                      const __grid_constant__ FastDivisor area, const __grid_constant__ FastDivisor pitch, int groups,
                      int channels) {
    const int64_t index = int64_t{blockIdx.x} * kFillThreads + threadIdx.x;
    if (index >= pixels) return;
    const int pixel = static_cast<int>(index), image = area.quotient(pixel), in_image = area.remainder(pixel, image);
    const int line = pitch.quotient(in_image), row = line - window.down_padding;
    const int column = pitch.remainder(in_image, line) - window.right_padding;
    const bool there = inside(row, window.height_in) && inside(column, window.width_in);
    x += ((int64_t{image} * window.height_in + row) * window.width_in + column) * groups * channels;
    words += index * groups * ((channels + kWord - 1) / kWord);
    for (int group = 0; group < groups; ++group)
        for (int left = channels; left > 0; left -= kWord, ++words) {
            uint32_t word = 0;
#pragma unroll
            for (int b = 0; b < kWord; ++b, ++x)
                if (there && b < left) word |= static_cast<uint32_t>(*x) << 8 * b;
            if (left < kWord) x += left - kWord;
            *words = word;
        }
}

// --- the op --------------------------------------------------------------------------------------------------------

struct Cuda {
    template <class T>
    static void conv(const Tensor& x, const ConvProblem& problem, T* y) {
        const ConvShape& s = problem.shape;
        const int64_t limit = 1 << 30, in_area = (s.in.height + 2 * s.padding.height) *
                                                 (s.in.width + 2 * s.padding.width);  // counted in 32 bits
        const int64_t reach =
            (s.kernel.height + kChunk) * s.dilation.height * (s.in.width + 2 * s.padding.width) * filled_bytes(s);
        STD_TORCH_CHECK(in_area < limit && s.panel_words() < limit && s.groups * s.panels_per_group() < limit,
                        "conv2d_integer: an image of ", s.in.height, " x ", s.in.width, ", a kernel of ",
                        s.kernel.height, " x ", s.kernel.width, " or ", s.out_channels, " outputs are too large");
        STD_TORCH_CHECK(reach < 2 * limit && s.out_channels < (1 << 22), "conv2d_integer: a window of ",
                        s.kernel.height, " rows of an image of ", s.in.width, " pixels of ", s.pixel_bytes(),
                        " bytes, or ", s.out_channels, " outputs are too large");
        constexpr ScalarType dtype = torch::headeronly::CppTypeToScalarType<T>::value;
        const int64_t together = s.depthwise() ? s.channels : s.group_outputs();
        const auto aligned = [](const void* p, int64_t n) { return reinterpret_cast<uintptr_t>(p) % n == 0; };
        const Activation& activation = problem.activation;
        Output output{y, dtype};
        output.vectors = together % kOctet == 0 && aligned(y, dtype == ScalarType::Byte ? 8 : 16) &&
                         aligned(problem.residual, 8) && aligned(problem.also, 8) &&
                         std::abs(activation.negative_slope) < 0x1p20f && !std::isnan(activation.upper);
        output.clamps =
            dtype == ScalarType::Byte && (activation.negative_slope == 0.0f || activation.negative_slope == 1.0f);
        const CurrentStream stream(x);

        // Pixels of a launch are counted in 31 bits.
        const int64_t images = std::max<int64_t>(1, (2 * limit - 1024) / std::max(s.out.area(), in_area));
        ConvProblem part = problem;
        part.out_packing.bytes = bytes_of(problem.out_packing, s.out_channels);
        part.also_packing.bytes = bytes_of(problem.also_packing, s.out_channels);
        for (int64_t first = 0; first < s.batch; first += images) {
            part.shape.batch = std::min(images, s.batch - first);
            const auto behind = [&](auto*& p, int64_t bytes) {
                if (p) p += first * bytes;
            };
            part.x = problem.x + first * s.in.area() * s.pixel_bytes();
            output.y = y + first * s.out.area() * part.out_packing.bytes;
            part.residual = problem.residual;
            part.also = problem.also;
            behind(part.residual, s.out.area() * s.out_channels);
            behind(part.also, s.out.area() * part.also_packing.bytes);
            if (s.depthwise()) {
                depthwise(part, output, stream);
            } else {
                product(x, part, output, stream);
            }
        }
    }

private:
    static int32_t bytes_of(const Packing& packing, int64_t channels) {
        return packing.starts ? packing.bytes : static_cast<int32_t>(channels);
    }

    // Bytes of a pixel when groups are filled up to words.
    static int64_t filled_bytes(const ConvShape& s) {
        return s.packed() ? s.pixel_bytes() : s.groups * s.words_per_tap() * kWord;
    }

    static void depthwise(const ConvProblem& problem, const Output& output, const CurrentStream& stream) {
        const ConvShape& s = problem.shape;
        const Strips strips(s.channels, 1);
        const bool vectors = s.channels % kOctet == 0 && reinterpret_cast<uintptr_t>(problem.x) % kOctet == 0 &&
                             reinterpret_cast<uintptr_t>(problem.weight) % kOctet == 0;
        start(vectors ? depthwise_kernel<true> : depthwise_kernel<false>, strips.blocks(s.pixels()), kStripThreads, 0,
              stream, problem, output, Window(s), strips);
    }

    // `border` pixels of zeros are around each image in memory.
    static void product(const Tensor& x, const ConvProblem& problem, const Output& output,
                        const CurrentStream& stream, const Extent& border = {0, 0}) {
        STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(problem.weight) % kVector == 0,
                        "conv2d_integer: weight must be aligned to 16 bytes");
        const ConvShape& s = problem.shape;
        const auto multiple = [&](int64_t n) {
            const int64_t begins = s.packed() ? std::gcd(s.low_bytes, s.high_bytes()) : s.group_channels();
            return begins % n == 0 && reinterpret_cast<uintptr_t>(problem.x) % n == 0;
        };
        const bool vectors = multiple(kVector), bordered = border.height > 0 || border.width > 0;
        if (!multiple(kWord) || (!vectors && !bordered && s.padding.height + s.padding.width > 0))
            return filled(x, problem, output, stream);
        if (s.packed())
            return vectors ? planned<kVector, true>(x, problem, output, stream, border)
                           : planned<kWord, true>(x, problem, output, stream, border);
        vectors ? planned<kVector, false>(x, problem, output, stream, border)
                : planned<kWord, false>(x, problem, output, stream, border);
    }

    // The same with a copy of the codes in which every group begins with a word and the padding is there.
    static void filled(const Tensor& x, const ConvProblem& problem, const Output& output,
                       const CurrentStream& stream) {
        ConvProblem part = problem;
        ConvShape& s = part.shape;
        const int64_t pitch = s.in.width + 2 * s.padding.width, area = (s.in.height + 2 * s.padding.height) * pitch;
        const int64_t bytes = filled_bytes(s), pixels = s.batch * area;
        const Tensor words = empty_vector(pixels * bytes / kWord, ScalarType::Int, x);
        const int64_t channels = s.packed() ? s.pixel_bytes() : s.group_channels();
        start(fill_words_kernel, ceil_div(pixels, kFillThreads), kFillThreads, 0, stream, problem.x,
              reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>()), Window(s), pixels, FastDivisor(area),
              FastDivisor(pitch), static_cast<int>(s.groups), static_cast<int>(channels));
        part.x = reinterpret_cast<const uint8_t*>(words.mutable_data_ptr<int32_t>()) +
                 (s.padding.height * pitch + s.padding.width) * bytes;
        if (!s.packed()) s.channels = bytes;
        product(x, part, output, stream, s.padding);
    }

    static Section section(const Product& product, int64_t unit, int64_t taps, int64_t bytes, int64_t first_byte,
                           int64_t first_word, int64_t row_bytes) {
        const Window& w = product.window;
        const int64_t units = bytes / unit;
        Section section{};
        if (units == 0) return section;
        section.units = FastDivisor(units);
        section.first_byte = static_cast<int>(first_byte);
        section.first_word = static_cast<int>(first_word);
        section.chunks = static_cast<int>(ceil_div(taps * bytes, row_bytes));
        section.next_tap = static_cast<int>(int64_t{w.right_step} * w.pixel_bytes - bytes);
        const auto step = [&](int64_t n) {
            const int64_t tap = n / units, down = tap / w.columns * w.down_step,
                          right = tap % w.columns * w.right_step;
            return Step{static_cast<int>(n % units), static_cast<int>(right), static_cast<int>(down),
                        static_cast<int>((down * w.pitch + right) * w.pixel_bytes + n % units * unit)};
        };
        section.chunk = step(row_bytes / unit);
        return section;
    }

    template <int kUnit, bool packed>
    static void planned(const Tensor& x, const ConvProblem& problem, const Output& output,
                        const CurrentStream& stream, const Extent& border) {
        const ConvShape& s = problem.shape;
        constexpr int kRowBytes = packed ? 32 : 64;
        Product product{Window(s, border)};
        const Window& w = product.window;
        const int64_t taps = s.kernel.area(), low = packed ? s.low_bytes : s.group_channels();
        const int64_t high = packed ? s.high_bytes() : 0;
        product.high = section(product, kUnit, taps, high, s.low_bytes, 0, kRowBytes);
        product.low = section(product, kUnit, taps, low, 0, 2 * taps * high / kWord, kRowBytes);
        product.kernel_columns = FastDivisor(s.kernel.width);
        product.right_end = w.columns * w.right_step;
        product.down_end = w.rows * w.down_step;
        product.next_row =
            static_cast<int>((int64_t{w.down_step} * w.pitch - product.right_end) * int64_t{w.pixel_bytes});
        product.group_bytes = static_cast<int>(s.group_channels());
        product.panels = static_cast<int>(s.panels_per_group());
        product.group_outputs = static_cast<int>(s.group_outputs());
        product.panel_words = static_cast<int>(s.panel_words());
        product.groups = FastDivisor(s.groups);
        product.share_outputs = static_cast<int>(ceil_div(s.group_outputs(), kOctet) * kOctet);
        product.share_sums = s.pixels() * product.share_outputs * s.groups;

        const int64_t chunks = product.high.chunks + product.low.chunks;
        const ConvPlan plan = plan_conv({s.pixels(), s.group_outputs(), s.groups, chunks}, {packed, kUnit == kVector},
                                        multiprocessors());
        product.splits = FastDivisor(plan.splits);
        const auto run = [&](auto tile, const Output& to) {
            constexpr ConvTile size = kConvTiles[tile];
            constexpr int kStrips = size.outputs / kStrip, kPixelWarps = size.pixels / kWarpPixels;
            using Shape = Tile<kStrips, kPixelWarps, kUnit, packed>;
            static_assert(Shape::threads == 32 * size.warps() && Shape::row_bytes == ConvCodes{packed}.pixel_bytes());
            product.strips = FastDivisor(ceil_div(s.group_outputs(), size.outputs));
            const int64_t tiles = plan.blocks / plan.splits;
            STD_TORCH_CHECK(plan.blocks <= kMaximumGrid, "conv2d_integer: the output is too large for one launch");
            product.tiles = FastDivisor(tiles);
            start(conv_kernel<kStrips, kPixelWarps, kUnit, packed>, plan.blocks, Shape::threads, Shape::bytes, stream,
                  problem, to, product);
        };
        const auto run_tile = [&](const Output& to) {
            switch (plan.tile) {
                case 0: return run(std::integral_constant<int, 0>{}, to);
                case 1: return run(std::integral_constant<int, 1>{}, to);
                case 2: return run(std::integral_constant<int, 2>{}, to);
                default: return run(std::integral_constant<int, 3>{}, to);
            }
        };
        if (plan.splits == 1) return run_tile(output);
        const Tensor workspace = empty_vector(plan.splits * product.share_sums, ScalarType::Int, x);
        int32_t* shares = workspace.mutable_data_ptr<int32_t>();
        run_tile({shares, ScalarType::Int});
        const Strips strips(s.group_outputs(), s.groups);
        start(add_kernel, strips.blocks(s.pixels()), kStripThreads, 0, stream, problem, output, product, strips,
              static_cast<const int32_t*>(shares));
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
