// An execution model of CUDA for the CPU: enough of the language for the kernels of this package to compile as host
// C++, unchanged, and to run. This folder comes first on the include path, in front of the real header of this name.
//
// A launch runs its blocks one after the other. Inside a block every thread is a fiber of the one host thread: it
// runs until it waits for others (at __syncthreads, or in a warp function), and then the next one runs. What the
// model adds to a device is strictness. It raises an error where a device would hang, or go on with undefined values:
//   - a barrier that not all threads of the block reach, also because some have returned;
//   - a warp function that not all lanes of its mask reach, or that reads a lane outside its mask;
//   - an asynchronous copy of a size or to an address that it cannot have.
// Blocks alternate between starting their threads in ascending and in descending order, so that a missing barrier
// changes results. An asynchronous copy spoils what it writes to when it begins, and delivers when the thread waits
// for it, so that a missing wait, or a missing end of a group, changes results. Built with -fsanitize=address,
// accesses outside of global and shared memory end the process.
//
// A launch that a device refuses does not run, and returns the device's error.
//
// It does not model time, memory ordering between blocks, or float instructions that differ from the host's.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one at a time: they can share one copy. The mark before it tells the model that its function has some.
#define __shared__ PTQ_SHARED(__LINE__)
#define PTQ_SHARED(line) PTQ_MARKED_SHARED(line)
#define PTQ_MARKED_SHARED(line)                         \
    static char shared_mark_##line;                     \
    cuda_on_cpu::has_shared_memory(shared_mark_##line); \
    static
#define __grid_constant__

// --- the place of a thread ---------------------------------------------------------------------------------------

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) int4 {
    int x, y, z, w;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- launches ----------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

// --- waiting for other threads -----------------------------------------------------------------------------------

namespace cuda_on_cpu {

using Place = std::source_location;
constexpr unsigned kAllLanes = 0xffffffffu;

// Runs `thread` once for every thread of the grid. Raises std::runtime_error for what is listed above.
cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// Counts the static shared memory of the function that a mark is in. The kernel ends if it has more than a device
// gives.
void has_shared_memory(const char& mark);

// Ends the kernel that runs with an error.
[[noreturn]] void fail(const std::string& error);

void wait_for_block(const Place& place);
// Waits for the lanes of the mask and returns the words that each brought, up to kWarpWords of them, by word and lane
// (valid until the thread waits again).
constexpr int kWarpWords = 3;
using WarpValues = const uint64_t (*)[warpSize];
WarpValues wait_for_warp(unsigned mask, std::initializer_list<uint64_t> values, const Place& place);
// The value of a lane, which must be in the mask.
uint64_t lane_value(const uint64_t* values, unsigned mask, int lane, const Place& place);
int this_lane();
void* dynamic_shared_memory();
extern int current_device, launches;

// Gives each lane the value of lane source(lane), or its own one where that is outside its segment of the warp.
template <class T, class F>
T shuffle(unsigned mask, T value, int width, const Place& place, const F& source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    const uint64_t* values = *wait_for_warp(mask, {bits}, place);
    const int segment = this_lane() / width * width, lane = source(this_lane() - segment);
    if (lane < 0 || lane >= width) return value;
    bits = lane_value(values, mask, segment + lane, place);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T, class F>
T reduce(unsigned mask, T value, const Place& place, const F& combine) {
    const uint64_t* values = *wait_for_warp(mask, {static_cast<uint64_t>(value)}, place);
    bool first = true;
    for (int lane = 0; lane < warpSize; ++lane)
        if (mask >> lane & 1) {
            value = first ? static_cast<T>(values[lane]) : combine(value, static_cast<T>(values[lane]));
            first = false;
        }
    return value;
}

}  // namespace cuda_on_cpu

#define PTQ_PLACE const cuda_on_cpu::Place& place = cuda_on_cpu::Place::current()

inline void __syncthreads(PTQ_PLACE) { cuda_on_cpu::wait_for_block(place); }
inline void __syncwarp(unsigned mask = cuda_on_cpu::kAllLanes, PTQ_PLACE) {
    cuda_on_cpu::wait_for_warp(mask, {}, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, PTQ_PLACE) {
    return cuda_on_cpu::shuffle(mask, value, width, place, [&](int) { return lane % width; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, PTQ_PLACE) {
    return cuda_on_cpu::shuffle(mask, value, width, place, [&](int l) { return l + static_cast<int>(delta); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, PTQ_PLACE) {
    return cuda_on_cpu::shuffle(mask, value, width, place, [&](int l) { return l - static_cast<int>(delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, PTQ_PLACE) {
    return cuda_on_cpu::shuffle(mask, value, width, place, [&](int l) { return l ^ bits; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, PTQ_PLACE) {
    const unsigned mine = static_cast<unsigned>(predicate != 0) << cuda_on_cpu::this_lane();
    return cuda_on_cpu::reduce(mask, mine, place, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, PTQ_PLACE) { return __ballot_sync(mask, predicate, place) != 0; }
inline int __all_sync(unsigned mask, int predicate, PTQ_PLACE) {
    return __ballot_sync(mask, predicate, place) == mask;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, PTQ_PLACE) {
    return cuda_on_cpu::reduce(mask, value, place, [](T a, T b) { return a + b; });
}

#undef PTQ_PLACE

// --- asynchronous copies, as in <cuda_pipeline_primitives.h> ------------------------------------------------------

// Copies `bytes` bytes to shared memory, the last `zeros` of which are zeros that are not read.
void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zeros = 0);
void __pipeline_commit();
// Waits for all groups of copies of this thread but the last `groups`; what is in no group yet is not waited for.
void __pipeline_wait_prior(size_t groups);

// --- small functions ---------------------------------------------------------------------------------------------

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
inline int32_t __float2int_rn(float x) {
    if (x != x) return 0;
    if (x >= 0x1p31f) return INT32_MAX;
    return x < -0x1p31f ? INT32_MIN : static_cast<int32_t>(std::rint(x));
}
// Byte i of the result is byte (selector >> 4i & 7) of the eight bytes of a and b.
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | uint64_t{b} << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
    return result;
}
// The larger of each of two 16-bit numbers.
inline unsigned __vmaxu2(unsigned a, unsigned b) {
    return max(a & 0xffff0000u, b & 0xffff0000u) | max(a & 0xffffu, b & 0xffffu);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T atomicAdd(T* p, T value) {  // one thread runs at a time
    const T old = *p;
    *p = old + value;
    return old;
}

// --- the runtime -------------------------------------------------------------------------------------------------

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it

inline cudaError_t cudaGetDevice(int* device) {
    *device = cuda_on_cpu::current_device;
    return cudaSuccess;
}
// Device d has d + 1 multiprocessors. Device 0 is the current one: on a small device small tensors already make
// threads loop. Tests that want a large one call cuda_on_cpu_use_device.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    *value = device + 1;
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

namespace cuda_on_cpu {

// What a device says to a launch, which is then the last error.
cudaError_t verdict(const void* kernel, const cudaLaunchConfig_t& config);

inline void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

}  // namespace cuda_on_cpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const cudaError_t error = cuda_on_cpu::verdict(reinterpret_cast<const void*>(kernel), *config);
    if (error != cudaSuccess) return error;
    const std::tuple<Parameters...> copies(arguments...);
    return cuda_on_cpu::run_grid(*config, [&] { std::apply(kernel, copies); });
}
