// How reductions read long rows: a block takes a stretch of one channel, its threads one vector after the other.
#pragma once

#include "launch.cuh"

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
    int64_t row = (begin + threadIdx.x) / rows.vectors_of_row, place = (begin + threadIdx.x) % rows.vectors_of_row;
    const int64_t row_step = blockDim.x / rows.vectors_of_row, place_step = blockDim.x % rows.vectors_of_row;
    for (int64_t i = begin + threadIdx.x; i < end; i += kAhead * blockDim.x) {
        Vector<T, V> in[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            if (i + u * blockDim.x < end)
                in[u] = load<V>(x + (row * rows.channels + channel) * rows.inner + place * V, rows.aligned);
            row += row_step;
            place += place_step;
            if (place >= rows.vectors_of_row) {
                place -= rows.vectors_of_row;
                ++row;
            }
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u)
            if (i + u * blockDim.x < end) {
#pragma unroll
                for (int j = 0; j < V; ++j) accumulator.add(static_cast<float>(in[u].at[j]));
            }
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
