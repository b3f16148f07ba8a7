// SPDX-License-Identifier: Apache-2.0
// Planes side by side: a vector of the processor's full width holds one pixel of each. Filters along either axis then are
// multiplications and additions of whole vectors, whatever the rates, and no width of an image leaves lanes empty.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#include "abi.h"
#include "storage.h"

namespace stylesan {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <class T> constexpr int kLanes = kVectorBytes / sizeof(T);     // Divides 16, which Python counts with.

template <class T> struct VectorOf {
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef T Value __attribute__((vector_size(kVectorBytes)));
    typedef Int Code __attribute__((vector_size(kVectorBytes)));
    typedef int32_t StoredCode __attribute__((vector_size(4 * kLanes<T>)));
    typedef T Quad __attribute__((vector_size(sizeof(T) * 4)));
    typedef Int QuadCode __attribute__((vector_size(sizeof(T) * 4)));
};
template <class T> using Vec = typename VectorOf<T>::Value;

//----------------------------------------------------------------------------

template <class T> struct Buffer {      // Aligned for vectors; zeros.
    explicit Buffer(int64_t count)
        : data(static_cast<T*>(std::aligned_alloc(128, (count * sizeof(T) + 127) / 128 * 128)), std::free) {
        if (!data) std::abort();
        std::memset(static_cast<void*>(data.get()), 0, count * sizeof(T));
    }
    T* get() { return data.get(); }
    std::unique_ptr<T[], void (*)(void*)> data;
};

// Between rows[lane][x] and row[x][lane].
template <class T> inline void gather_lanes(const T* const* rows, Vec<T>* row, int64_t width) {
    using Quad = typename VectorOf<T>::Quad;
    using Mask = typename VectorOf<T>::QuadCode;
    T* out = reinterpret_cast<T*>(row);
    constexpr int lanes = kLanes<T>;
    int64_t x = 0;
    for (; lanes >= 4 && x + 4 <= width; x += 4) {
        for (int l = 0; l < lanes; l += 4) {
            Quad a, b, c, d;
            std::memcpy(&a, rows[l] + x, sizeof(Quad));
            std::memcpy(&b, rows[l + 1] + x, sizeof(Quad));
            std::memcpy(&c, rows[l + 2] + x, sizeof(Quad));
            std::memcpy(&d, rows[l + 3] + x, sizeof(Quad));
            const Quad ab = __builtin_shuffle(a, b, Mask{0, 4, 1, 5}), ab2 = __builtin_shuffle(a, b, Mask{2, 6, 3, 7});
            const Quad cd = __builtin_shuffle(c, d, Mask{0, 4, 1, 5}), cd2 = __builtin_shuffle(c, d, Mask{2, 6, 3, 7});
            const Quad result[4] = {__builtin_shuffle(ab, cd, Mask{0, 1, 4, 5}), __builtin_shuffle(ab, cd, Mask{2, 3, 6, 7}),
                                    __builtin_shuffle(ab2, cd2, Mask{0, 1, 4, 5}), __builtin_shuffle(ab2, cd2, Mask{2, 3, 6, 7})};
            for (int q = 0; q < 4; q++) std::memcpy(out + (x + q) * lanes + l, &result[q], sizeof(Quad));
        }
    }
    for (; x < width; x++)
        for (int l = 0; l < lanes; l++) out[x * lanes + l] = rows[l][x];
}

template <class T> inline void scatter_lanes(const Vec<T>* row, T* const* rows, int64_t width) {
    using Quad = typename VectorOf<T>::Quad;
    using Mask = typename VectorOf<T>::QuadCode;
    const T* in = reinterpret_cast<const T*>(row);
    constexpr int lanes = kLanes<T>;
    int64_t x = 0;
    for (; lanes >= 4 && x + 4 <= width; x += 4) {
        for (int l = 0; l < lanes; l += 4) {
            Quad a, b, c, d;
            std::memcpy(&a, in + x * lanes + l, sizeof(Quad));
            std::memcpy(&b, in + (x + 1) * lanes + l, sizeof(Quad));
            std::memcpy(&c, in + (x + 2) * lanes + l, sizeof(Quad));
            std::memcpy(&d, in + (x + 3) * lanes + l, sizeof(Quad));
            const Quad ab = __builtin_shuffle(a, b, Mask{0, 4, 1, 5}), ab2 = __builtin_shuffle(a, b, Mask{2, 6, 3, 7});
            const Quad cd = __builtin_shuffle(c, d, Mask{0, 4, 1, 5}), cd2 = __builtin_shuffle(c, d, Mask{2, 6, 3, 7});
            const Quad result[4] = {__builtin_shuffle(ab, cd, Mask{0, 1, 4, 5}), __builtin_shuffle(ab, cd, Mask{2, 3, 6, 7}),
                                    __builtin_shuffle(ab2, cd2, Mask{0, 1, 4, 5}), __builtin_shuffle(ab2, cd2, Mask{2, 3, 6, 7})};
            for (int q = 0; q < 4; q++) std::memcpy(rows[l + q] + x, &result[q], sizeof(Quad));
        }
    }
    for (; x < width; x++)
        for (int l = 0; l < lanes; l++) rows[l][x] = in[x * lanes + l];
}

//----------------------------------------------------------------------------

// Some planes of a batch of images. Lanes beyond the last plane read that plane again and write nothing.
template <class S> class PlaneBlock {
   public:
    using T = Compute<S>;
    static constexpr int lanes = kLanes<T>;

    PlaneBlock(const StylesanImages& images, int64_t block, const S* bias)
        : images_(images), temp_(images.w * lanes) {
        const int64_t planes = images.n * images.c;
        count_ = planes - block * lanes < lanes ? planes - block * lanes : lanes;
        together_ = count_ == lanes;
        for (int l = 0; l < lanes; l++) {
            const int64_t plane = block * lanes + (l < count_ ? l : count_ - 1), c = plane % images.c;
            base_[l] = static_cast<S*>(images.data) + plane / images.c * images.stride_n + c * images.stride_c;
            bias_[l] = bias ? to_compute(bias[c]) : T(0);
            together_ = together_ && base_[l] == base_[0] + l;
        }
    }

    // Row y, with the bias added, to [width][lane].
    void load(int64_t y, Vec<T>* row) {
        const int64_t width = images_.w, step = images_.stride_w, start = y * images_.stride_h;
        T* out = reinterpret_cast<T*>(row);
        if (together_) {
            for (int64_t x = 0; x < width; x++)
                for (int l = 0; l < lanes; l++) out[x * lanes + l] = to_compute(base_[0][start + x * step + l]);
        } else if (step == 1) {
            const T* rows[lanes];
            for (int l = 0; l < lanes; l++) rows[l] = converted(l, start);
            gather_lanes<T>(rows, row, width);
        } else {
            for (int64_t x = 0; x < width; x++)
                for (int l = 0; l < lanes; l++) out[x * lanes + l] = to_compute(base_[l][start + x * step]);
        }
        for (int64_t x = 0; x < width; x++) row[x] += bias_;
    }

    void store(int64_t y, const Vec<T>* row) {
        const int64_t width = images_.w, step = images_.stride_w, start = y * images_.stride_h;
        const T* in = reinterpret_cast<const T*>(row);
        if (together_) {
            for (int64_t x = 0; x < width; x++)
                for (int l = 0; l < lanes; l++) base_[0][start + x * step + l] = to_storage<S>(in[x * lanes + l]);
        } else if (step == 1) {
            const bool direct = std::is_same_v<S, T> && count_ == lanes;
            T* rows[lanes];
            for (int l = 0; l < lanes; l++)
                rows[l] = direct ? reinterpret_cast<T*>(base_[l] + start) : temp_.get() + l * width;
            scatter_lanes<T>(row, rows, width);
            for (int l = 0; l < (direct ? 0 : count_); l++)
                for (int64_t x = 0; x < width; x++) base_[l][start + x] = to_storage<S>(rows[l][x]);
        } else {
            for (int64_t x = 0; x < width; x++)
                for (int l = 0; l < count_; l++) base_[l][start + x * step] = to_storage<S>(in[x * lanes + l]);
        }
    }

   private:
    const T* converted(int l, int64_t start) {
        if constexpr (std::is_same_v<S, T>) return base_[l] + start;
        T* temp = temp_.get() + l * images_.w;
        for (int64_t x = 0; x < images_.w; x++) temp[x] = to_compute(base_[l][start + x]);
        return temp;
    }

    StylesanImages images_;
    Buffer<T> temp_;
    S* base_[lanes];
    Vec<T> bias_;
    int count_;
    bool together_;
};

}  // namespace stylesan
