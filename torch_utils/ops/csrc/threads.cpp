// SPDX-License-Identifier: Apache-2.0
// PyTorch's threads for code that knows nothing of PyTorch. The only file that includes its headers.
#include <ATen/Parallel.h>

#include "threads.h"

void stylesan_parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    if (count <= 1) return count ? body(0, 1, context) : void();
    at::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}
