// SPDX-License-Identifier: Apache-2.0
// The programs of tiles.h on a GPU.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace stylesan {
template <class Program> int launch(int64_t blocks, int threads, size_t shared_bytes, void* stream, const Program& p);
}

#include "tiles.h"

namespace stylesan {

template <class Program> __global__ void __launch_bounds__(kThreads) run(const __grid_constant__ Program program) {
    extern __shared__ __align__(16) char memory[];
    program(Block{int64_t(blockIdx.x), int(threadIdx.x), int(blockDim.x), memory});
}

template <class Program>
int launch(int64_t blocks, int threads, size_t shared_bytes, void* stream, const Program& program) {
    run<<<dim3(uint32_t(blocks)), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(program);
    return int(cudaGetLastError());
}

}  // namespace stylesan
