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
// The paddings let the 32 lanes of a warp read 32 different banks. The sums go through shared memory once more, so
// that they are finished and stored channel by channel, as they lie in memory.
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
constexpr int kCodeRow = kChunk + 4;  // words
constexpr int kWeightRow = kPanelOutputs + 8;
constexpr int kWeightWords = kPanels * kChunk * kWeightRow;  // of a buffer
constexpr int kWarpPixels = 32, kWarpOutputs = 32;
constexpr int kSumRow = kOutputs + 4;
constexpr int kVector = 4;  // outputs that a thread finishes together

// kWarps warps along the pixels, two along the outputs.
template <int kWarps>
struct Tile {
    static constexpr int pixels = kWarps * kWarpPixels, threads = kWarps * 2 * 32;
    static constexpr int stage_words = pixels * kCodeRow + kWeightWords;
    static constexpr size_t bytes = sizeof(uint32_t) * std::max(kStages * stage_words, pixels* kSumRow + kOutputs);
};

// --- from sums to outputs ------------------------------------------------------------------------------------------

// Where outputs go. Their type is no template parameter: it matters in one place only, and there are enough kernels.
struct Output {
    void* y;
    ScalarType dtype;
    bool aligned;  // kVector outputs, and as many codes of the residual or a second output, are one vector in memory
};

template <int V, class T>
__device__ __forceinline__ void put(void* to, int64_t at, int count, bool aligned, const float (&values)[V]) {
    T* y = static_cast<T*>(to) + at;
    Vector<T, V> v;
#pragma unroll
    for (int j = 0; j < V; ++j) v.at[j] = static_cast<T>(values[j]);
    if (count == V) return store<V>(y, v, aligned);
#pragma unroll  // registers have no index at run time
    for (int j = 0; j < V; ++j)
        if (j < count) y[j] = v.at[j];
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
    const auto put_codes = [&](void* to, const Quantizer(&quantizers)[V]) {
        float codes[V];
#pragma unroll
        for (int j = 0; j < V; ++j) codes[j] = static_cast<float>(int_code(values[j], quantizers[j]));
        put<V, uint8_t>(to, at, of.count, output.aligned, codes);
    };
    if (problem.also) put_codes(problem.also, of.also);
    using torch::headeronly::BFloat16, torch::headeronly::Half;
    switch (output.dtype) {
        case ScalarType::Byte: return put_codes(output.y, of.out);
        case ScalarType::Half: return put<V, Half>(output.y, at, of.count, output.aligned, values);
        case ScalarType::BFloat16: return put<V, BFloat16>(output.y, at, of.count, output.aligned, values);
        default: return put<V, float>(output.y, at, of.count, output.aligned, values);
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

template <int kWarps, Fetch fetch>
__global__ void __launch_bounds__(Tile<kWarps>::threads) conv_kernel(ConvProblem problem, Output output) {
    using Shape = Tile<kWarps>;
    constexpr int kThreadsPerRow = kChunk / 4, kRows = 2;  // a thread fetches 4 words of 2 pixels
    static_assert(Shape::pixels * kThreadsPerRow == kRows * Shape::threads);
    uint32_t* shared = dynamic_shared_memory<uint32_t>();
    const ConvShape& s = problem.shape;
    const int thread = threadIdx.x;

    // Which outputs and pixels are this block's.
    const int64_t panels = s.panels_per_group(), strips = (panels + kPanels - 1) / kPanels;
    const int64_t strip = blockIdx.x % strips, group = blockIdx.x / strips % s.groups;
    const int64_t first_pixel = blockIdx.x / (strips * s.groups) * Shape::pixels;
    const int64_t first_panel = group * panels + strip * kPanels, end_panel = (group + 1) * panels;
    const int64_t pixels = s.pixels();
    const int words = static_cast<int>(s.panel_words());
    const int height = static_cast<int>(s.in.height), width = static_cast<int>(s.in.width);
    const int down_step = static_cast<int>(s.dilation.height), right_step = static_cast<int>(s.dilation.width);
    const int words_per_tap = static_cast<int>(s.words_per_tap()), kernel_width = static_cast<int>(s.kernel.width);
    const int channels = static_cast<int>(s.group_channels());

    const int piece = thread % kThreadsPerRow * 4;  // the first of this thread's words in a chunk
    Source sources[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int64_t index = first_pixel + thread / kThreadsPerRow + i * (Shape::pixels / kRows);
        const Pixel pixel(s, min(index, pixels - 1));  // the sums of pixels that do not exist are not stored
        sources[i].image = problem.x + pixel.image * s.in.area() * s.channels + group * channels;
        sources[i].row = pixel.row;
        sources[i].column = pixel.column;
    }

    const auto fetch_chunk = [&](int chunk, uint32_t* stage) {
        uint32_t* weights = stage + Shape::pixels * kCodeRow;
        for (int i = thread; i < kPanels * kChunk * 4; i += Shape::threads) {  // 16 bytes: 4 outputs
            const int panel = i / (kChunk * 4), word = i / 4 % kChunk;
            const bool there = first_panel + panel < end_panel && chunk * kChunk + word < words;
            const int64_t from = ((first_panel + panel) * words + chunk * kChunk + word) * 64 + i % 4 * 16;
            copy_async<16>(weights + (panel * kChunk + word) * kWeightRow + i % 4 * 4,
                           problem.weight + (there ? from : 0), there);
        }
#pragma unroll
        for (int part = 0; part < (fetch == Fetch::vectors ? 1 : 4); ++part) {
            const int word = chunk * kChunk + piece + part, tap = word / words_per_tap, in_tap = word % words_per_tap;
            const int down = tap / kernel_width * down_step, right = tap % kernel_width * right_step;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const int row = sources[i].row + down, column = sources[i].column + right;
                const bool there = word < words && inside(row, height) && inside(column, width);
                const uint8_t* from = sources[i].image;
                if (there) from += int64_t{row * width + column} * s.channels + in_tap * kWordChannels;
                uint32_t* to =
                    stage + (thread / kThreadsPerRow + i * (Shape::pixels / kRows)) * kCodeRow + piece + part;
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
        const uint32_t* weights = stage + Shape::pixels * kCodeRow;
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
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) b[n][i] = stage[(warp_pixel + n * 8 + g) * kCodeRow + step + q + i * 4];
#pragma unroll
            for (int panel = 0; panel < 2; ++panel)
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply_add(sums[panel][n], a[panel], b[n]);
        }
    };

    const int chunks = (words + kChunk - 1) / kChunk;
    for (int chunk = 0; chunk < kStages - 1; ++chunk) {
        if (chunk < chunks) fetch_chunk(chunk, shared + chunk * Shape::stage_words);
        end_of_copies();
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this chunk is there, and all threads have done with the one before
        const int next = chunk + kStages - 1;
        if (next < chunks) fetch_chunk(next, shared + next % kStages * Shape::stage_words);
        end_of_copies();
        multiply_chunk(shared + chunk % kStages * Shape::stage_words);
    }
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
    if (problem.zero_sums)
        for (int o = thread; o < kOutputs; o += Shape::threads)
            zeros[o] = first_output + o < end_output ? sum_of_zeros(problem, first_output + o) : 0;
    __syncthreads();

    constexpr int kThreadsPerPixel = kOutputs / kVector;
    const int mine = thread % kThreadsPerPixel * kVector;
    const Channels<kVector> of(problem, first_output + mine, end_output);
    if (of.count <= 0) return;
    for (int p = thread / kThreadsPerPixel; p < Shape::pixels; p += Shape::threads / kThreadsPerPixel) {
        if (first_pixel + p >= pixels) break;
        int32_t four[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) four[j] = gathered[p * kSumRow + mine + j];
        if (problem.zero_sums)
            subtract_zeros(problem, of.count, first_pixel + p, first_output + mine, zeros + mine, four);
        finish(problem, of, first_pixel + p, first_output + mine, four, output);
    }
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
                            s.panel_words() < limit,
                        "conv2d_integer: an image of ", s.in.height, " x ", s.in.width, " or a kernel of ",
                        s.kernel.height, " x ", s.kernel.width, " is too large");
        constexpr ScalarType dtype = torch::headeronly::CppTypeToScalarType<T>::value;
        const bool aligned = is_aligned<kVector>(y) && is_aligned<kVector>(problem.residual) &&
                             is_aligned<kVector>(problem.also);  // a null pointer is
        const CurrentStream stream(x);
        if (s.depthwise()) {
            depthwise(problem, {y, dtype, s.channels % kVector == 0 && aligned}, stream);
        } else {
            product(problem, {y, dtype, s.group_outputs() % kVector == 0 && aligned}, stream);
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
        if (output.aligned && is_aligned<kVector>(problem.x) && is_aligned<kVector>(problem.weight))
            return run(std::integral_constant<int, kVector>{});
        run(std::integral_constant<int, 1>{});
    }

    static void product(const ConvProblem& problem, const Output& output, const CurrentStream& stream) {
        STD_TORCH_CHECK(is_aligned<16>(problem.weight), "conv2d_integer: weight must be aligned to 16 bytes");
        const auto multiple = [&](int64_t n) {
            return problem.shape.group_channels() % n == 0 && reinterpret_cast<uintptr_t>(problem.x) % n == 0;
        };
        if (multiple(16)) return with_tile<Fetch::vectors>(problem, output, stream);
        if (multiple(4)) return with_tile<Fetch::words>(problem, output, stream);
        with_tile<Fetch::bytes>(problem, output, stream);
    }

    // The largest tile that leaves every multiprocessor something to do.
    template <Fetch fetch>
    static void with_tile(const ConvProblem& problem, const Output& output, const CurrentStream& stream) {
        const ConvShape& s = problem.shape;
        const auto blocks = [&](int64_t pixels) {
            return ceil_div(s.pixels(), pixels) * s.groups * ceil_div(s.panels_per_group(), kPanels);
        };
        const auto run = [&](auto warps) {
            using Shape = Tile<warps>;
            start(conv_kernel<warps, fetch>, blocks(Shape::pixels), Shape::threads, Shape::bytes, stream, problem,
                  output);
        };
        const int64_t wanted = 2 * multiprocessors();
        if (blocks(Tile<4>::pixels) >= wanted) return run(std::integral_constant<int, 4>{});
        if (blocks(Tile<2>::pixels) >= wanted) return run(std::integral_constant<int, 2>{});
        run(std::integral_constant<int, 1>{});
    }

    static void start(void (*kernel)(ConvProblem, Output), int64_t grid, int threads, size_t shared_bytes,
                      const CurrentStream& stream, const ConvProblem& problem, const Output& output) {
        STD_TORCH_CHECK(grid <= kMaximumGrid, "conv2d_integer: the output is too large for one launch");
        launch(kernel, grid, threads, shared_bytes, stream, problem, output);
    }
};

}  // namespace

PTQ4CUDA_LIBRARY_IMPL(m) { m.impl("conv2d_integer", TORCH_BOX(&ConvOps<Cuda>::conv2d_integer)); }

}  // namespace ptq4cuda
