// What every kernel file needs to reach a device: launches, the stream, facts about the device, vectors in memory.
//
// All launches go through launch() instead of <<<>>>, and kernels are registered with PTQ4CUDA_LIBRARY_IMPL, so that
// the same files also compile as plain C++ for the execution model of CUDA in tests/cuda_on_cpu.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "../entry.h"

namespace ptq4cuda {

// Bytes in registers; two bytes are the low half of a word.
template <int kBytes>
struct Words {
    uint32_t at[kBytes < 4 ? 1 : kBytes / 4];
};

}  // namespace ptq4cuda

#if defined(PTQ4CUDA_ON_CPU)
#include <cuda_on_cpu.h>
#define PTQ4CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(ptq4cuda_on_cpu, CPU, m)
#else
#define PTQ4CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CUDA, m)

#define PTQ_NOINLINE __noinline__

namespace ptq4cuda {

// The current stream of a tensor's device, which stays the current device while this lives.
class CurrentStream {
public:
    explicit CurrentStream(const Tensor& t) : guard_(t.get_device_index()) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }
    operator cudaStream_t() const { return stream_; }

private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
};

// The shared memory that a launch asked for.
template <class T>
__device__ T* dynamic_shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}

}  // namespace ptq4cuda
#endif

#include "instructions.cuh"

namespace ptq4cuda {

constexpr int64_t kMaximumGrid = (int64_t{1} << 31) - 1;
constexpr size_t kSharedForAll = 48 << 10;  // bytes of shared memory that a launch may have without asking

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
    if (shared_bytes > kSharedForAll)
        STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared_bytes)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Multiprocessors of the current device, asked for once.
inline int64_t multiprocessors() {
    static std::array<std::atomic<int>, 64> known{};
    int device = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    std::atomic<int>& count = known[device % known.size()];
    if (count == 0) {
        int value = 0;
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device));
        count = value;
    }
    return count;
}

// N neighbouring values, moved by one instruction where they fill 2 to 16 bytes and are aligned so.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

template <int N, class T>
__host__ __device__ inline bool is_aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * N) == 0;
}

// `aligned` is the same for all threads of a launch, so that the branch costs next to nothing.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* p, bool aligned) {
    if (aligned) return *reinterpret_cast<const Vector<T, N>*>(p);
    Vector<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.at[i] = p[i];
    return v;
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const Vector<T, N>& v, bool aligned) {
    if (aligned && sizeof(v) > 1) {
        Words<sizeof(v)> words{};
        memcpy(&words, &v, sizeof(v));
        store_words(p, words);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) p[i] = v.at[i];
    }
}

// Calls f with the widest vector that divides a row of `length` values and fits the alignment of its start:
// f(std::integral_constant<int, 16 / sizeof(T)>), or 4, or 1.
template <class T, class F>
void with_vector_width(const T* p, int64_t length, const F& f) {
    constexpr int kFull = 16 / sizeof(T);
    if (length % kFull == 0 && is_aligned<kFull>(p)) return f(std::integral_constant<int, kFull>{});
    if constexpr (kFull > 4) {
        if (length % 4 == 0 && is_aligned<4>(p)) return f(std::integral_constant<int, 4>{});
    }
    f(std::integral_constant<int, 1>{});
}

}  // namespace ptq4cuda
