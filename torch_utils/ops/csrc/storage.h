// SPDX-License-Identifier: Apache-2.0
// Storage types: float, double, Half, BFloat16. Calculations are in float or double.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "abi.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace stylesan {

#ifdef __CUDACC__
using Half = __half;
#define STYLESAN_HAS_HALF 1
#elif defined(__FLT16_MAX__)
using Half = _Float16;
#define STYLESAN_HAS_HALF 1
#endif

struct BFloat16 {
    uint16_t bits;
};

template <class S> using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S> STYLESAN_FN Compute<S> to_compute(S s) {
    if constexpr (std::is_same_v<S, BFloat16>) {
        const uint32_t bits = uint32_t(s.bits) << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    } else {
        return Compute<S>(s);
    }
}

template <class S> STYLESAN_FN S to_storage(Compute<S> value) {
    if constexpr (std::is_same_v<S, BFloat16>) {    // To the nearest, ties to even; a NaN stays one.
        uint32_t bits;
        memcpy(&bits, &value, 4);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return {uint16_t(value == value ? rounded : 0x7fc0)};
    } else {
        return S(value);
    }
}

// Call f with a value of the storage type; false if the compiler has no such type.
template <class F> bool with_type(int32_t type, F f) {
    switch (type) {
        case kFloat32: f(float()); return true;
        case kFloat64: f(double()); return true;
        case kBFloat16: f(BFloat16()); return true;
#ifdef STYLESAN_HAS_HALF
        case kFloat16: f(Half()); return true;
#endif
        default: return false;
    }
}

}  // namespace stylesan
