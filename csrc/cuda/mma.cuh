// Tensor core products, what feeds them, and asynchronous copies, for every GPU since Turing.
// tests/cuda_on_cpu/model/cuda_on_cpu.h has the same functions for the CPU.
#pragma once

#include "launch.cuh"

#if !defined(PTQ4CUDA_ON_CPU)

namespace ptq4cuda {

// c += a b for matrices of signed bytes a (16 x 32, by rows), unsigned bytes b (32 x 8, by columns), sums c (16 x 8).
// A lane holds, with g = lane / 4 and q = lane % 4 and four neighbouring bytes a word:
//     a[0] row g, bytes 4q...   a[1] row g + 8   a[2] row g, bytes 16 + 4q...   a[3] row g + 8, bytes 16 + 4q...
//     b[0] column g, bytes 4q...                 b[1] column g, bytes 16 + 4q...
//     c[0], c[1] row g, columns 2q and 2q + 1    c[2], c[3] row g + 8
__device__ __forceinline__ void multiply_add(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing: 8 rows and 16 bytes at a time
#pragma unroll
    for (int i = 0; i < 4; ++i)
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[i % 2 * 2]), "+r"(c[i % 2 * 2 + 1])
            : "r"(a[i]), "r"(b[i / 2]));
#endif
}

// Where something lies in shared memory, in 32 bits; a byte further is one more.
using SharedAddress = uint32_t;

// The address is worked out once: the compiler, which would rather do that anew each time, does not see how.
__device__ __forceinline__ SharedAddress shared_address(const void* shared) {
    SharedAddress address;
    asm volatile("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(shared));
    return address;
}

// 16 bytes of shared memory.
__device__ __forceinline__ void load_shared(uint32_t (&words)[4], SharedAddress from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
}

// Four matrices of 8 rows of 16 bytes from shared memory: lane 8 m + r knows where row r of matrix m is, at a
// multiple of 16 bytes, and lane 4 r + q gets word q of it in words[m].
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

// sum + the products of the four unsigned bytes of a word with the signed ones of another.
__device__ __forceinline__ int32_t dot(uint32_t codes, uint32_t weights, int32_t sum) {
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(codes), "r"(weights));
    return sum;
}

// Copies N bytes (4, 8 or 16, aligned) from global to shared memory, or zeros if `inside` is false. On Ampere and
// later the copy goes on while the thread does; it is complete after wait_for_copies and a barrier.
template <int N>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* global, bool inside) {
#if __CUDA_ARCH__ >= 800
    if constexpr (N == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(inside ? N : 0)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(N),
                     "r"(inside ? N : 0)
                     : "memory");
    }
#else
    Vector<uint32_t, N / 4> v{};
    if (inside) v = *static_cast<const Vector<uint32_t, N / 4>*>(global);
#pragma unroll
    for (int i = 0; i < N / 4; ++i)
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + 4 * i), "r"(v.at[i]) : "memory");
#endif
}

// Ends a group of copies; a thread that has none counts them all the same.
__device__ __forceinline__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N groups of this thread's copies, the last ones, are under way.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace ptq4cuda
#endif
