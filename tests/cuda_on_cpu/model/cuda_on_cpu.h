// What csrc/cuda/launch.cuh needs of a device, on the model. Tensors lie in host memory.
#pragma once

#include <cuda_runtime.h>

#define PTQ_NOINLINE __attribute__((noinline))

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(EXPR) cuda_on_cpu::check(EXPR)

namespace ptq4cuda {

struct CurrentStream {
    explicit CurrentStream(const Tensor&) {}
    operator cudaStream_t() const { return nullptr; }
};

template <class T>
T* dynamic_shared_memory() {
    return static_cast<T*>(cuda_on_cpu::dynamic_shared_memory());
}

// --- csrc/cuda/instructions.cuh ----------------------------------------------------------------------------------

// A device raises an error at an address that is not a multiple of the size.
template <int kBytes>
void check_alignment(const void* p) {
    constexpr int kAccess = kBytes < 16 ? kBytes : 16;
    if (reinterpret_cast<uintptr_t>(p) % kAccess)
        cuda_on_cpu::fail("an access of " + std::to_string(kAccess) + " bytes that are not aligned");
}
template <int kBytes>
Words<kBytes> load_words(const void* p) {
    check_alignment<kBytes>(p);
    Words<kBytes> w{};
    std::memcpy(&w, p, kBytes);
    return w;
}
template <int kBytes>
void store_words(void* p, const Words<kBytes>& w, bool inside = true) {
    if (!inside) return;
    check_alignment<kBytes>(p);
    std::memcpy(p, &w, kBytes);
}

inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }
inline float min_nan(float a, float b) { return a < b || a != a ? a : b; }

// f of each pair of values in two words.
template <class T, class F>
uint32_t by_value(uint32_t a, uint32_t b, const F& f) {
    T left[4 / sizeof(T)], right[4 / sizeof(T)];
    std::memcpy(left, &a, sizeof(a));
    std::memcpy(right, &b, sizeof(b));
    for (size_t i = 0; i < 4 / sizeof(T); ++i)
        left[i] = static_cast<T>(f(static_cast<float>(left[i]), static_cast<float>(right[i])));
    std::memcpy(&a, left, sizeof(a));
    return a;
}
template <class T>
uint32_t max_nan_word(uint32_t a, uint32_t b) {
    return by_value<T>(a, b, max_nan);
}
template <class T>
uint32_t min_nan_word(uint32_t a, uint32_t b) {
    return by_value<T>(a, b, min_nan);
}
template <class T>
uint32_t count_positive(uint32_t word) {
    uint32_t count = 0;
    by_value<T>(word, word, [&](float v, float) {
        count += v > 0.0f;
        return v;
    });
    return count;
}

template <class T>
T* row_of(T* array, int i, int row) {
    return array + int64_t{i} * row;
}
template <class T>
T* worked_out(T* p) {
    return p;
}
inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }
inline int32_t add_clamped(int32_t a, int32_t b, int32_t largest) { return std::max(std::min(a + b, largest), 0); }

class SharedCounters {
public:
    SharedCounters() = default;
    explicit SharedCounters(uint32_t* counters) : counters_(counters) {}
    void count(int32_t i) const { ++counters_[i]; }

private:
    uint32_t* counters_;
};

template <class T>
uint32_t word_of_two(float first, float second) {
    return T(first).x | uint32_t{T(second).x} << 16;
}

// --- csrc/cuda/mma.cuh: the lanes bring their words to the warp, and each takes what its sums need ---------------

inline void multiply_add(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const cuda_on_cpu::Place& place = cuda_on_cpu::Place::current()) {
    const auto two = [](uint32_t low, uint32_t high) { return low | uint64_t{high} << 32; };
    const auto words = cuda_on_cpu::wait_for_warp(cuda_on_cpu::kAllLanes,
                                                  {two(a[0], a[1]), two(a[2], a[3]), two(b[0], b[1])}, place);
    const int g = cuda_on_cpu::this_lane() / 4, q = cuda_on_cpu::this_lane() % 4;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 32; ++k) {
            const int half = k / 16, owner = k % 16 / 4, shift = k % 4 * 8;
            const uint64_t left = words[half][4 * g + owner] >> (i / 2 * 32 + shift);
            const uint64_t right = words[2][4 * (2 * q + i % 2) + owner] >> (half * 32 + shift);
            c[i] += static_cast<int8_t>(left) * static_cast<uint8_t>(right);
        }
}

using SharedAddress = uint8_t*;
inline SharedAddress shared_address(void* shared) { return static_cast<uint8_t*>(shared); }

inline void check_aligned(const void* p, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % 16)
        throw std::runtime_error(std::string("cuda_on_cpu: ") + what + " that is not aligned to 16 bytes");
}

inline void load_shared(uint32_t (&words)[4], SharedAddress from) {
    check_aligned(from, "a load");
    std::memcpy(words, from, 16);
}

inline void load_matrices(uint32_t (&words)[4], SharedAddress row,
                          const cuda_on_cpu::Place& place = cuda_on_cpu::Place::current()) {
    check_aligned(row, "a row of a matrix");
    const auto rows = *cuda_on_cpu::wait_for_warp(cuda_on_cpu::kAllLanes, {reinterpret_cast<uintptr_t>(row)}, place);
    const int lane = cuda_on_cpu::this_lane();
    for (int m = 0; m < 4; ++m)
        std::memcpy(&words[m], reinterpret_cast<const uint32_t*>(rows[8 * m + lane / 4]) + lane % 4, 4);
}

inline int32_t dot(uint32_t codes, uint32_t weights, int32_t sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<uint8_t>(codes >> i) * static_cast<int8_t>(weights >> i);
    return sum;
}

template <int N>
void copy_async(SharedAddress shared, const void* global, bool inside) {
    __pipeline_memcpy_async(shared, inside ? global : nullptr, N, inside ? 0 : N);
}
inline void end_of_copies() { __pipeline_commit(); }
template <int N>
void wait_for_copies() {
    __pipeline_wait_prior(N);
}

}  // namespace ptq4cuda
