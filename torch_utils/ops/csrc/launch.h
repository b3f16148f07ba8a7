// SPDX-License-Identifier: Apache-2.0
// Programs of blocks on a GPU.
#pragma once
#include <cuda_runtime.h>

#include "block.h"

namespace stylesan {

// Of the current device.
inline int processors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return 1;
    return count;
}

// Registers are allotted so that nothing is kept in memory, which the report of the build shows for every program. For
// sm_80 the compiler must be told that one block is enough, or it makes room for a third one; the later ones do better
// without being told.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define STYLESAN_BOUNDS(threads) __launch_bounds__(threads, 1)
#else
#define STYLESAN_BOUNDS(threads) __launch_bounds__(threads)
#endif

template <class Program>
__global__ void STYLESAN_BOUNDS(Program::kBlockThreads) run(const __grid_constant__ Program program) {
    extern __shared__ __align__(16) char memory[];
    program(Block{int64_t(blockIdx.x), int(threadIdx.x), int(blockDim.x), memory});
}

template <class Program> int launch(int64_t blocks, size_t shared_bytes, void* stream, const Program& program) {
    run<<<dim3(uint32_t(blocks)), Program::kBlockThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(program);
    return int(cudaGetLastError());
}

}  // namespace stylesan
