// What csrc/cuda/launch.cuh needs of a device, on the model. Tensors lie in host memory.
#pragma once

#include <cuda_runtime.h>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(EXPR) ((void)(EXPR))

namespace ptq4cuda {

struct CurrentStream {
    explicit CurrentStream(const Tensor&) {}
    operator cudaStream_t() const { return nullptr; }
};

template <class T>
T* dynamic_shared_memory() {
    return static_cast<T*>(cuda_on_cpu::dynamic_shared_memory());
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
    cuda_on_cpu::launch(kernel, dim3(static_cast<unsigned>(grid)), dim3(block), shared_bytes, arguments...);
}

}  // namespace ptq4cuda
