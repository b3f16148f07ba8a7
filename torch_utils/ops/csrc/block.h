// SPDX-License-Identifier: Apache-2.0
// What programs of blocks of threads are made of, and why a call of them failed.
#pragma once
#include <cstddef>

#include "storage.h"

namespace stylesan {

// Beside the codes of CUDA, which are positive.
constexpr int kNoSuchType = -1, kTooManyTaps = -2, kTileTooLarge = -3, kNoSuchProgram = -4;

// One of the blocks of threads that run a program: a callable of a Block, with the number of threads as kBlockThreads.
struct Block {
    int64_t index;
    int thread, threads;
    char* memory;
};

// Run a program on so many blocks, each with that much memory of its own: on a GPU (launch.h) or in turn on a processor
// (emulate.cpp). 0 is success. And how many blocks can run beside each other.
template <class Program> int launch(int64_t blocks, size_t shared_bytes, void* stream, const Program& program);
inline int processors();

}  // namespace stylesan
