// max_pool_codes on CUDA: a thread takes the largest codes of a few channels of one output pixel. Neighbouring
// threads read neighbouring memory; what windows share comes from the cache.
#include "../pool.h"
#include "launch.cuh"

namespace ptq4cuda {
namespace {

constexpr int kThreads = 256;

// The largest of bytes, four of them in a word. Two 16-bit maxima need no bytes taken apart: a larger byte in front
// makes a larger number, whatever the byte behind it is.
struct LargestOfFour {
    uint32_t before = 0, behind = 0;

    __device__ __forceinline__ void add(uint32_t four) {
        before = __vmaxu2(before, four);
        behind = __vmaxu2(behind, four & 0x00ff00ffu);
    }
    __device__ __forceinline__ uint32_t result() const { return (before & 0xff00ff00u) | behind; }
};
struct LargestOfOne {
    uint8_t best = 0;

    __device__ __forceinline__ void add(uint8_t one) { best = one > best ? one : best; }
    __device__ __forceinline__ uint8_t result() const { return best; }
};
template <class Word>
using Largest = std::conditional_t<sizeof(Word) == 1, LargestOfOne, LargestOfFour>;

// A block computes a piece of one row of outputs, so that no index needs a division in 64 bits.
template <class Word, int V>
__global__ void __launch_bounds__(kThreads) max_pool_kernel(PoolProblem problem, unsigned blocks_of_row) {
    const unsigned vectors = static_cast<unsigned>(problem.channels / (V * sizeof(Word)));
    const unsigned row = blockIdx.x / blocks_of_row;
    const unsigned piece = blockIdx.x % blocks_of_row * blockDim.x + threadIdx.x;
    const unsigned column = piece / vectors, vector = piece % vectors;
    if (column >= problem.out.width) return;
    const unsigned height = static_cast<unsigned>(problem.out.height);
    const Inside rows = problem.rows(row % height), columns = problem.columns(column);
    const int64_t line = problem.in.width * vectors, pixel = problem.dilation.width * vectors;
    const Word* x =
        reinterpret_cast<const Word*>(problem.x) +
        ((row / height * problem.in.height + rows.first) * line + columns.first * int64_t{vectors} + vector) * V;
    Largest<Word> best[V];
    for (int r = 0; r < rows.count; ++r) {
        const Word* tap = x + r * problem.dilation.height * line * V;
        for (int c = 0; c < columns.count; ++c, tap += pixel * V) {
            const Vector<Word, V> codes = load<V>(tap, true);
#pragma unroll
            for (int j = 0; j < V; ++j) best[j].add(codes.at[j]);
        }
    }
    const int64_t at = (int64_t{row} * problem.out.width + column) * vectors + vector;
    Vector<Word, V> codes;
#pragma unroll
    for (int j = 0; j < V; ++j) codes.at[j] = best[j].result();
    store<V>(reinterpret_cast<Word*>(problem.y) + at * V, codes, true);
}

struct Cuda {
    static void max_pool(const Tensor& x, const PoolProblem& problem) {
        const CurrentStream stream(x);
        const auto aligned = [&](int64_t bytes) {
            return problem.channels % bytes == 0 && reinterpret_cast<uintptr_t>(problem.x) % bytes == 0 &&
                   reinterpret_cast<uintptr_t>(problem.y) % bytes == 0;
        };
        if (aligned(16)) return run<uint32_t, 4>(problem, stream);
        if (aligned(4)) return run<uint32_t, 1>(problem, stream);
        run<uint8_t, 1>(problem, stream);
    }

private:
    template <class Word, int V>
    static void run(const PoolProblem& problem, const CurrentStream& stream) {
        const int64_t threads = problem.out.width * (problem.channels / static_cast<int64_t>(V * sizeof(Word)));
        const int64_t rows = problem.batch * problem.out.height;
        int block = 32;
        while (block < threads && block < kThreads) block *= 2;
        const int64_t blocks_of_row = ceil_div(threads, block);
        STD_TORCH_CHECK(threads <= kMaximumGrid && rows <= kMaximumGrid / blocks_of_row,
                        "max_pool_codes: the output is too large for one launch");
        launch(max_pool_kernel<Word, V>, rows * blocks_of_row, block, 0, stream, problem,
               static_cast<unsigned>(blocks_of_row));
    }
};

}  // namespace

PTQ4CUDA_LIBRARY_IMPL(m) { m.impl("max_pool_codes", TORCH_BOX(&PoolOps<Cuda>::max_pool_codes)); }

}  // namespace ptq4cuda
