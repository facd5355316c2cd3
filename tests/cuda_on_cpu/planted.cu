// Small kernels for test_model.py: right ones, whose results are known, and wrong ones, which the model must catch.
// Usage: planted CASE
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cuda/mma.cuh"

namespace {

using ptq4cuda::copy_async, ptq4cuda::dynamic_shared_memory, ptq4cuda::end_of_copies, ptq4cuda::shared_address,
    ptq4cuda::wait_for_copies;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64;

// --- right -------------------------------------------------------------------------------------------------------

// The sum of a block's values by shuffles, then through shared memory; the lanes with an odd value.
__global__ void sum_kernel(const int* x, int* sum, unsigned* odd) {
    __shared__ int of_warp[kThreads / 32];
    const int i = blockIdx.x * blockDim.x + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int value = x[i];
    const unsigned ballot = __ballot_sync(kAll, value % 2);
    for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(kAll, value, delta);
    if (lane == 0) {
        of_warp[warp] = value;
        odd[i / 32] = ballot;
    }
    __syncthreads();
    if (threadIdx.x == 0) sum[blockIdx.x] = of_warp[0] + of_warp[1];
}

// Warp functions of half a warp, in a branch; dynamic shared memory; three dimensions.
__global__ void halves_kernel(double* out) {
    double* shared = dynamic_shared_memory<double>();
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z), lane = thread % 32;
    double value = thread;
    if (lane < 16) {
        value = __shfl_xor_sync(0x0000ffffu, value, 15, 16);
    } else {
        value = __shfl_up_sync(0xffff0000u, value, 1, 16) + __reduce_add_sync(0xffff0000u, 1);
    }
    __syncwarp();
    shared[thread] = __shfl_sync(kAll, value, 3) + (__all_sync(kAll, lane < 32) && !__any_sync(kAll, lane > 31));
    __syncthreads();
    out[thread] = shared[kThreads - 1 - thread] + value;
}

// How a kernel may copy its input to shared memory, chunk by chunk, one ahead of the one that it adds up; and what
// may be missing. In each chunk a thread adds what another thread, of another warp, has copied.
enum class Missing { nothing, wait, end_of_group, barrier_after_wait, barrier_before_copy };
constexpr int kChunks = 5;

template <Missing missing>
__global__ void copies_kernel(const int4* x, int4* sums) {
    __shared__ int4 stages[2][kThreads];
    const int other = (threadIdx.x + kThreads / 2) % kThreads;
    const auto fetch = [&](int chunk) {
        if (chunk < kChunks)
            copy_async<16>(shared_address(&stages[chunk % 2][threadIdx.x]), &x[chunk * kThreads + threadIdx.x],
                           threadIdx.x != 7);
        if (missing != Missing::end_of_group) end_of_copies();
    };
    int4 sum{};
    fetch(0);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        fetch(chunk + 1);
        if (missing != Missing::wait) wait_for_copies<1>();
        if (missing != Missing::barrier_after_wait) __syncthreads();
        const int4 four = stages[chunk % 2][other];
        sum.x += four.x, sum.y += four.y, sum.z += four.z, sum.w += four.w;
        if (missing != Missing::barrier_before_copy) __syncthreads();
    }
    sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// Static shared memory, some of it in a function, beside the dynamic one.
template <int N>
__device__ int* half_of_it() {
    __shared__ int half[N / 2];
    return half;
}
template <int N>
__global__ void static_kernel(int* x) {
    __shared__ int first[N / 4];
    __shared__ int second[N / 4];
    int* third = half_of_it<N>();
    first[threadIdx.x] = second[threadIdx.x] = third[threadIdx.x] = threadIdx.x;
    __syncthreads();
    const int other = blockDim.x - 1 - threadIdx.x;
    x[threadIdx.x] = first[other] + second[other] - third[other];
}
constexpr int kStatic = 10 << 10;  // integers, 40 KiB

__global__ void one_thread_kernel(int* x) { x[threadIdx.x] = dynamic_shared_memory<unsigned char>()[0]; }

// --- wrong -------------------------------------------------------------------------------------------------------

__global__ void returned_kernel(int* x) {
    if (threadIdx.x == 5) return;
    x[threadIdx.x] = 0;
    __syncthreads();
}

__global__ void two_barriers_kernel(int* x) {
    if (threadIdx.x < 7) {
        x[threadIdx.x] = 0;
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void lane_missing_kernel(int* x) {
    if (threadIdx.x != 9) x[threadIdx.x] = __shfl_down_sync(kAll, 1, 1);
}

__global__ void lane_outside_the_mask_kernel(int* x) {
    if (threadIdx.x < 8) x[threadIdx.x] = __shfl_sync(0x000000ffu, 1, 12);
}

__global__ void not_in_the_mask_kernel(int* x) { x[threadIdx.x] = __shfl_sync(0xfffffffeu, 1, 1); }

__global__ void misaligned_copy_kernel(const int* x) {
    __shared__ int4 shared[2];
    if (threadIdx.x == 3) copy_async<16>(shared_address(&shared[0].y), x, true);
}

__global__ void half_a_warp_kernel(int* x) { x[threadIdx.x] = __ballot_sync(kAll, 1); }

// Without the barrier each thread reads what its neighbour has not written yet, or has, by the order of the threads.
__global__ void missing_barrier_kernel(int* x) {
    __shared__ int shared[kThreads];
    shared[threadIdx.x] = 100 * blockIdx.x + threadIdx.x;
    x[blockIdx.x * blockDim.x + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

template <int N>
__global__ void beyond_shared_kernel(int* x, int length) {
    __shared__ int shared[N];
    for (int i = threadIdx.x; i < length; i += blockDim.x) shared[i] = i;
    __syncthreads();
    x[threadIdx.x] = shared[threadIdx.x];
}

__global__ void beyond_dynamic_shared_kernel(int* x) {
    int* shared = dynamic_shared_memory<int>();
    shared[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = shared[threadIdx.x + 1];
}

__global__ void beyond_global_kernel(int* x, int length) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= length) x[i] = i;
}

// -----------------------------------------------------------------------------------------------------------------

template <class T>
void print(const std::vector<T>& values) {
    for (const T& value : values) std::printf("%.17g ", static_cast<double>(value));
    std::printf("\n");
}

// In blocks of any shape, as a device takes them, and without the attribute that launch() sets.
template <class... Parameters, class... Arguments>
void launch_as_it_is(void (*kernel)(Parameters...), int64_t grid, dim3 block, size_t shared_bytes,
                     const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes,
            const Arguments&... arguments) {
    ptq4cuda::launch(kernel, grid, block, shared_bytes, nullptr, arguments...);
}

template <Missing missing>
void copies() {
    std::vector<int4> x(kChunks * kThreads), sums(2 * kThreads);
    for (int i = 0; i < kChunks * kThreads; ++i) x[i] = {i, 2 * i, 3 * i, 4 * i};
    launch(copies_kernel<missing>, 2, kThreads, 0, x.data(), sums.data());
    std::vector<int> flat;
    for (const int4& sum : sums) flat.insert(flat.end(), {sum.x, sum.y, sum.z, sum.w});
    print(flat);
}

int run(const std::string& name) {
    const std::unique_ptr<int[]> memory(new int[kThreads]);
    int* x = memory.get();
    if (name == "sum") {
        std::vector<int> values(3 * kThreads), sums(3);
        std::vector<unsigned> odd(6);
        for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i * i % 97);
        launch(sum_kernel, 3, kThreads, 0, values.data(), sums.data(), odd.data());
        print(sums);
        print(odd);
    } else if (name == "halves") {
        std::vector<double> out(kThreads);
        launch_as_it_is(halves_kernel, 1, dim3(4, 8, 2), kThreads * sizeof(double), out.data());
        print(out);
    } else if (name == "missing_barrier") {
        std::vector<int> out(2 * kThreads);
        launch(missing_barrier_kernel, 2, kThreads, 0, out.data());
        print(out);
    } else if (name == "returned") {
        launch(returned_kernel, 2, kThreads, 0, x);
    } else if (name == "two_barriers") {
        launch(two_barriers_kernel, 1, kThreads, 0, x);
    } else if (name == "lane_missing") {
        launch(lane_missing_kernel, 1, kThreads, 0, x);
    } else if (name == "lane_outside_the_mask") {
        launch(lane_outside_the_mask_kernel, 1, kThreads, 0, x);
    } else if (name == "not_in_the_mask") {
        launch(not_in_the_mask_kernel, 1, kThreads, 0, x);
    } else if (name == "half_a_warp") {
        launch(half_a_warp_kernel, 1, 48, 0, x);
    } else if (name == "too_many_threads") {
        launch(returned_kernel, 1, 1025, 0, x);
    } else if (name == "no_blocks") {
        launch(returned_kernel, 0, kThreads, 0, x);
    } else if (name == "shared_without_asking") {
        launch_as_it_is(one_thread_kernel, 1, 1, (48 << 10) + 1, x);
    } else if (name == "shared_48_kib") {
        launch_as_it_is(one_thread_kernel, 1, 1, 48 << 10, x);
    } else if (name == "shared_after_asking") {
        launch(one_thread_kernel, 1, 1, 227 << 10, x);
        launch_as_it_is(one_thread_kernel, 1, 1, 227 << 10, x);
    } else if (name == "too_much_shared") {
        launch(one_thread_kernel, 1, 1, (227 << 10) + 1, x);
    } else if (name == "static_and_8_kib") {
        launch(static_kernel<kStatic>, 2, 32, 8 << 10, x);
    } else if (name == "static_and_more_than_8_kib") {
        launch(static_kernel<kStatic>, 2, 32, (8 << 10) + 1, x);
    } else if (name == "static_after_asking") {
        launch(static_kernel<kStatic>, 2, 32, 187 << 10, x);
    } else if (name == "static_and_too_much") {
        launch(static_kernel<kStatic>, 2, 32, (187 << 10) + 1, x);
    } else if (name == "no_threads") {
        launch(one_thread_kernel, 1, 0, 0, x);
    } else if (name == "flat_block_of_65") {
        launch_as_it_is(one_thread_kernel, 1, dim3(1, 1, 65), 0, x);
    } else if (name == "error_is_forgotten") {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(0);
        const cudaError_t first = cudaLaunchKernelEx(&config, one_thread_kernel, x);
        const cudaError_t last = cudaGetLastError(), after = cudaGetLastError();
        std::printf("%s, %s, %s\n", cudaGetErrorString(first), cudaGetErrorString(last), cudaGetErrorString(after));
    } else if (name == "copies") {
        copies<Missing::nothing>();
    } else if (name == "missing_wait") {
        copies<Missing::wait>();
    } else if (name == "missing_end_of_group") {
        copies<Missing::end_of_group>();
    } else if (name == "missing_barrier_after_wait") {
        copies<Missing::barrier_after_wait>();
    } else if (name == "missing_barrier_before_copy") {
        copies<Missing::barrier_before_copy>();
    } else if (name == "misaligned_copy") {
        launch(misaligned_copy_kernel, 1, 32, 0, x);
    } else if (name == "inside_shared") {
        launch(beyond_shared_kernel<kThreads>, 1, kThreads, 0, x, kThreads);
    } else if (name == "beyond_shared") {
        launch(beyond_shared_kernel<kThreads>, 1, kThreads, 0, x, kThreads + 1);
    } else if (name == "beyond_dynamic_shared") {
        launch(beyond_dynamic_shared_kernel, 1, kThreads, kThreads * sizeof(int), x);
    } else if (name == "inside_global") {
        launch(beyond_global_kernel, 1, kThreads, 0, x, kThreads - 1);
    } else if (name == "beyond_global") {
        launch(beyond_global_kernel, 2, kThreads, 0, x, kThreads);
    } else {
        return 2;
    }
    return 0;
}

}  // namespace

// Runs the cases in turn: an error leaves the model ready for the next launch.
int main(int count, char** names) {
    int failures = 0;
    for (int i = 1; i < count; ++i) {
        try {
            if (run(names[i]) != 0) return 2;
        } catch (const std::exception& error) {
            std::printf("%s\n", error.what());
            ++failures;
        }
    }
    return failures > 0;
}
