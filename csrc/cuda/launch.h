// One grid-stride launch for every elementwise body.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/numeric.h"

namespace rewarm {

constexpr int THREADS = 256;
constexpr int BLOCKS_PER_MULTIPROCESSOR = 16;

template <class Body>
__global__ void __launch_bounds__(THREADS) each_element(Body body, int64_t elements) {
    const int64_t stride = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < elements; i += stride) body(i);
}

// Run body(i) for every element on the current device, in `stream`. Returns a CUDA error code, 0 for success.
template <class Body>
int launch(const Body& body, int64_t elements, void* stream) {
    if (elements == 0) return cudaSuccess;
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t needed = (elements + THREADS - 1) / THREADS;
    const int64_t most = int64_t(multiprocessors) * BLOCKS_PER_MULTIPROCESSOR;
    each_element<<<int(needed < most ? needed : most), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(body, elements);
    return cudaGetLastError();
}

}  // namespace rewarm
