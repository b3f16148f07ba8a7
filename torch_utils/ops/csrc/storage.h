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

// The bits of a stored value in a register of their own.
template <class S> using Bits =
    std::conditional_t<sizeof(S) == 2, uint16_t, std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>>;
template <class S> using WideBits = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;

template <class S> STYLESAN_FN WideBits<S> to_bits(S s) {
    Bits<S> bits;
    memcpy(&bits, &s, sizeof(S));
    return bits;
}

template <class S> STYLESAN_FN S from_bits(WideBits<S> wide) {
    const Bits<S> bits = Bits<S>(wide);
    S s;
    memcpy(&s, &bits, sizeof(S));
    return s;
}

// The bits of a value that nobody writes while the program runs, or other bits. On GPUs one instruction, no branch.
template <class S> STYLESAN_FN WideBits<S> load_or(const void* from, bool wanted, WideBits<S> other) {
#ifdef __CUDA_ARCH__
    static_assert(sizeof(S) <= 4);
    if constexpr (sizeof(S) == 2)
        asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u16 %0, [%1]; }"
            : "+r"(other) : "l"(from), "r"(int(wanted)));
    else
        asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }"
            : "+r"(other) : "l"(from), "r"(int(wanted)));
    return other;
#else
    return wanted ? to_bits(*static_cast<const S*>(from)) : other;
#endif
}

template <class S> STYLESAN_FN void store_if(S* to, bool wanted, S value) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(S) == 2)
        asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p st.global.u16 [%0], %2; }"
            :: "l"(to), "r"(int(wanted)), "h"(uint16_t(to_bits(value))) : "memory");
    else
        asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p st.global.u32 [%0], %2; }"
            :: "l"(to), "r"(int(wanted)), "r"(to_bits(value)) : "memory");
#else
    if (wanted) *to = value;
#endif
}

template <class S> constexpr int32_t code_of_type() {
    if constexpr (std::is_same_v<S, float>) return kFloat32;
    if constexpr (std::is_same_v<S, double>) return kFloat64;
    return std::is_same_v<S, BFloat16> ? kBFloat16 : kFloat16;
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
