// How reductions read long rows: a block takes a stretch of one channel, its threads one vector after the other.
#pragma once

#include "codes.cuh"

namespace ptq4cuda {
namespace {

constexpr int kInFlight = 4;       // vectors a thread loads before it uses the first
constexpr int64_t kShortRow = 32;  // shorter rows are read as columns of a matrix

struct Rows {
    int64_t channels, inner;
    int64_t vectors_of_row, vectors_of_channel, vectors_of_unit;
    int64_t splits;  // units of a channel
    bool aligned;
};

// The vectors begin to end of a channel, dealt to the threads of a block in turn. A thread loads kAhead of them
// before it uses the first.
template <class T, int V, int kAhead = kInFlight, class A>
__device__ __forceinline__ void add_rows(const T* x, const Rows& rows, int64_t channel, int64_t begin, int64_t end,
                                         A& accumulator) {
    constexpr int kBytes = V * sizeof(T);
    // A row ends as many vectors after `from` as are left in it; the next one of the channel begins `gap` values
    // later. No thread goes as far as 2^30 vectors, so that a longer row counts as one of 2^30.
    const int64_t first = begin + threadIdx.x, row = first / rows.vectors_of_row, place = first % rows.vectors_of_row;
    const auto limited = [](int64_t vectors) { return static_cast<int>(min(vectors, int64_t{1} << 30)); };
    const int whole = limited(rows.vectors_of_row), places = limited(blockDim.x % rows.vectors_of_row);
    int left = limited(rows.vectors_of_row - place);
    const T* from = x + (row * rows.channels + channel) * rows.inner + place * V;
    const int64_t gap = (rows.channels - 1) * rows.inner;
    const int64_t step = blockDim.x / rows.vectors_of_row * rows.channels * rows.inner + places * int64_t{V};
    const auto advance = [&] {
        from += step;
        left -= places;
        if (left <= 0) {
            left += whole;
            from += gap;
        }
    };
    int64_t i = first;
    if (rows.aligned) {
        for (; i + (kAhead - 1) * blockDim.x < end; i += kAhead * blockDim.x) {
            Words<kBytes> in[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                in[u] = load_words<kBytes>(from);
                advance();
            }
#pragma unroll
            for (int u = 0; u < kAhead; ++u) accumulator.add(in[u]);
        }
    }
#pragma unroll 1  // what is left, or all
    for (; i < end; i += blockDim.x) {
        accumulator.add(load_group<T, kBytes>(from, rows.aligned));
        advance();
    }
}

// The smallest power of two that has a thread for each piece of work, from 32 to `maximum`.
int block_size(int64_t work, int maximum) {
    int threads = 32;
    while (threads < work && threads < maximum) threads *= 2;
    return threads;
}

}  // namespace
}  // namespace ptq4cuda
