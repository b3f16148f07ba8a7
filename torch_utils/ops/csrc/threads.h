// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

// Call body(begin, end, context) for parts of [0, count) of at least `grain`, in the threads that PyTorch uses.
extern "C" void stylesan_parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                      void* context);
