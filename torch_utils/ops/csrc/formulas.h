// SPDX-License-Identifier: Apache-2.0
// What is computed per element, once for processor and GPU: activations and their derivatives, the two bits that the
// derivative of a clamped leaky ReLU depends on, and which samples an output of a resampler sees.
// V is a floating-point number or, on processors, a vector of them (GCC's and Clang's vector extension).
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define STYLESAN_FN __host__ __device__ __forceinline__
#else
#define STYLESAN_FN inline __attribute__((always_inline))
#endif

namespace stylesan {

template <class T> STYLESAN_FN constexpr T min_of(T a, T b) { return b < a ? b : a; }
template <class T> STYLESAN_FN constexpr T max_of(T a, T b) { return a < b ? b : a; }

// The lower half of (high, low) >> shift, 0 <= shift < 32.
STYLESAN_FN uint32_t funnel_shift(uint32_t low, uint32_t high, int shift) {
#ifdef __CUDA_ARCH__
    return __funnelshift_r(low, high, shift);
#else
    return uint32_t((uint64_t(high) << 32 | low) >> shift);
#endif
}

//----------------------------------------------------------------------------
// Leaky ReLU with a bound.

template <class V> STYLESAN_FN V leaky(V x, V slope) { return x > V{} ? x : x * slope; }

template <class V> STYLESAN_FN V bounded(V x, V limit) { return x > limit ? limit : (x < -limit ? -limit : x); }

// The same where slope <= 1, in two instructions of a GPU.
template <class T> STYLESAN_FN T gentle_leaky(T x, T slope) { return std::fmax(x, x * slope); }

// `bounded` in two instructions of a GPU. What is not a number stays so.
template <class T> STYLESAN_FN T tightly_bounded(T x, T limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) == 4) {
        asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
        asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-limit));
        return x;
    }
#endif
    return bounded(x, limit);
}

// Two bits per value: 1 where the slope applies, 2 where the bound does. V is leaky(x).
constexpr int kBitsPerCode = 2, kCodesPerWord = 16;
constexpr int kNegative = 1, kBounded = 2;

template <class I, class V> STYLESAN_FN I code_of(V x, V activated, V limit) {
    const I none = I{}, negative = none + kNegative, bound = none + kBounded;
    const I low = x > V{} ? none : negative;
    const I beyond = activated > limit ? bound : (activated < -limit ? bound : none);
    return low | beyond;
}

// v times the derivative that the code stands for.
template <class I, class V> STYLESAN_FN V apply_code(I code, V v, V slope) {
    const I none = I{};
    const V scaled = (code & (none + kNegative)) != none ? v * slope : v;
    return (code & (none + kBounded)) != none ? V{} : scaled;
}

//----------------------------------------------------------------------------
// Activations: value (order 0), first and second derivative.

enum Activation { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

template <class T> struct ActivationSettings {
    T alpha, gain, clamp;   // clamp: infinity for none.
};

template <class T> STYLESAN_FN T sigmoid_of(T x) { return T(1) / (T(1) + std::exp(-x)); }

template <class T> STYLESAN_FN T softplus_of(T x) {     // Without overflow: max(x, 0) + log(1 + exp(-|x|)).
    return (x > T(0) ? x : T(0)) + std::log1p(std::exp(x > T(0) ? -x : x));
}

template <int act, int order, class T> STYLESAN_FN T activate(T x, T alpha) {
    constexpr T kScale = T(1.0507009873554805), kAlpha = T(1.6732632423543772);
    const bool positive = x > T(0);
    if constexpr (act == kLinear) return order == 0 ? x : T(order == 1);
    if constexpr (act == kRelu || act == kLrelu) {
        const T slope = act == kRelu ? T(0) : alpha;
        if constexpr (order == 0) return act == kRelu ? (x < T(0) ? T(0) : x) : leaky(x, slope);
        return order == 1 ? (positive ? T(1) : slope) : T(0);
    }
    if constexpr (act == kTanh) {
        const T t = std::tanh(x), slope = T(1) - t * t;
        return order == 0 ? t : order == 1 ? slope : T(-2) * t * slope;
    }
    if constexpr (act == kSigmoid || act == kSoftplus || act == kSwish) {
        if constexpr (act == kSoftplus && order == 0) return softplus_of(x);
        const T s = sigmoid_of(x), slope = s * (T(1) - s), bend = slope * (T(1) - T(2) * s);
        if constexpr (act == kSigmoid) return order == 0 ? s : order == 1 ? slope : bend;
        if constexpr (act == kSoftplus) return order == 1 ? s : slope;
        return order == 0 ? x * s : order == 1 ? s + x * slope : T(2) * slope + x * bend;
    }
    if constexpr (act == kElu || act == kSelu) {
        const T scale = act == kElu ? T(1) : kScale, depth = act == kElu ? T(1) : kScale * kAlpha;
        if constexpr (order == 0) return positive ? scale * x : depth * std::expm1(x);
        return positive ? (order == 1 ? scale : T(0)) : depth * std::exp(x);
    }
    return T(0);
}

// `activate`, chosen when it runs.
template <int order, class T> STYLESAN_FN T activate_any(int act, T x, T alpha) {
    switch (act) {
        case kLinear: return activate<kLinear, order>(x, alpha);
        case kRelu: return activate<kRelu, order>(x, alpha);
        case kTanh: return activate<kTanh, order>(x, alpha);
        case kSigmoid: return activate<kSigmoid, order>(x, alpha);
        case kElu: return activate<kElu, order>(x, alpha);
        case kSelu: return activate<kSelu, order>(x, alpha);
        case kSoftplus: return activate<kSoftplus, order>(x, alpha);
        case kSwish: return activate<kSwish, order>(x, alpha);
        default: return activate<kLrelu, order>(x, alpha);
    }
}

// clamp(gain * activation(x)), or its derivative of that order times g. kAct -1: `act` says which.
template <int kAct, int order, class T>
STYLESAN_FN T bias_act_at(int act, T x, T g, const ActivationSettings<T>& s) {
    T y, d = T(0);
    if constexpr (kAct >= 0) {
        y = s.gain * activate<kAct, 0>(x, s.alpha);
        if constexpr (order > 0) d = activate<kAct, order>(x, s.alpha);
    } else {
        y = s.gain * activate_any<0>(act, x, s.alpha);
        if constexpr (order > 0) d = activate_any<order>(act, x, s.alpha);
    }
    if constexpr (order == 0) return bounded(y, s.clamp);
    return y > s.clamp || y < -s.clamp ? T(0) : g * (s.gain * d);
}

//----------------------------------------------------------------------------
// Resampling along one axis: out[o] = sum over inputs i of f[i * up + pad - o * down] in[i], where f is 0 outside.

template <class Int> struct AxisOf {
    Int in, out, up, down, pad, taps;

    // Every output meets this many inputs, the last ones perhaps with a coefficient of 0.
    STYLESAN_FN Int reach() const { return (taps + up - 1) / up; }
    // The first of them, perhaps outside the signal: the smallest i with i * up + pad - o * down >= 0.
    STYLESAN_FN Int first(Int o) const {
        const Int distance = o * down - pad;
        return distance >= 0 ? (distance + up - 1) / up : -(-distance / up);
    }
    // Its tap; the next input has the tap `up` further. Also the phase of the output.
    STYLESAN_FN Int phase(Int o) const { return first(o) * up + pad - o * down; }
};
using Axis = AxisOf<int64_t>;

}  // namespace stylesan
