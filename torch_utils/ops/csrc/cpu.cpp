// SPDX-License-Identifier: Apache-2.0
// The operations on processors: upfirdn2d, the filtered leaky ReLU, bias and activation.
#include <algorithm>
#include <limits>
#include <vector>

#include "lanes.h"
#include "threads.h"

namespace stylesan {

//----------------------------------------------------------------------------
// Memory for rows while a block of planes is worked on: zeros, aligned for vectors. Each thread keeps what small images
// need, because for these it takes as long to ask for memory as to compute.

constexpr int64_t kKeptBytes = 1 << 18;

class Scratch {
   public:
    Scratch() : begin_(used()) {}
    ~Scratch() { used() = begin_; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T> T* take(int64_t count) {
        const int64_t bytes = (count * sizeof(T) + 127) / 128 * 128;
        if (used() + bytes > kKeptBytes) return reinterpret_cast<T*>(more_.emplace_back(bytes).get());
        static thread_local Buffer<char> kept(kKeptBytes);
        char* at = kept.get() + used();
        used() += bytes;
        std::memset(at, 0, bytes);
        return reinterpret_cast<T*>(at);
    }

   private:
    static int64_t& used() {
        static thread_local int64_t bytes = 0;
        return bytes;
    }

    int64_t begin_;
    std::vector<Buffer<char>> more_;
};

//----------------------------------------------------------------------------
// Filters.

constexpr int kGroup = 8;   // Outputs at a time, or 4 or 2: enough independent sums to keep the adders busy.

// out[m * stride] = sum over rows r and taps j of taps[r * reach + j] * rows[r][from + m * step + j], for kCount
// numbers m.
// kStep 0: the compiler does not know `step`. kOneTap: `reach` is 1.
template <class T, int kStep, bool kOneTap, int kCount>
inline __attribute__((always_inline)) void sum_taps(Vec<T>* out, int64_t stride, const Vec<T>* const* rows,
                                                    int64_t num_rows, int64_t from, const T* taps, int64_t reach,
                                                    int64_t step, int64_t m) {
    step = kStep ? kStep : step;
    reach = kOneTap ? 1 : reach;
    Vec<T> sums[kCount] = {};
    for (int64_t r = 0; r < num_rows; r++) {
        const Vec<T>* in = rows[r] + from + m * step;
        for (int64_t j = 0; j < reach; j++, in++) {
            const T tap = taps[r * reach + j];
#pragma GCC unroll 8
            for (int q = 0; q < kCount; q++) sums[q] += tap * in[q * step];
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < kCount; q++) out[(m + q) * stride] = sums[q];
}

// kCount outputs at a time; fewer where there are not so many.
template <class T, int kStep, bool kOneTap, int kCount = kGroup>
void fir_steps(Vec<T>* out, int64_t stride, const Vec<T>* const* rows, int64_t num_rows, int64_t from, const T* taps,
               int64_t reach, int64_t step, int64_t count) {
    if constexpr (kCount > 1)
        if (count < kCount)
            return fir_steps<T, kStep, kOneTap, kCount / 2>(out, stride, rows, num_rows, from, taps, reach, step,
                                                            count);
    for (int64_t m = 0; m < count; m += kCount)     // The last group does some again.
        sum_taps<T, kStep, kOneTap, kCount>(out, stride, rows, num_rows, from, taps, reach, step,
                                            std::min(m, count - kCount));
}

template <class T>
void fir(Vec<T>* out, int64_t stride, const Vec<T>* const* rows, int64_t num_rows, int64_t from, const T* taps,
         int64_t reach, int64_t step, int64_t count) {
    auto* run = step == 1 ? (reach == 1 ? fir_steps<T, 1, true> : fir_steps<T, 1, false>)
        : step == 2 ? fir_steps<T, 2, false> : fir_steps<T, 0, false>;
    run(out, stride, rows, num_rows, from, taps, reach, step, count);
}

// A filter with its taps sorted by phase.
template <class T> class Filter {
   public:
    explicit Filter(const StylesanFilter& f) : x(f.x), y(f.y), separable(f.taps_y != nullptr) {
        if (separable) {
            taps_x_ = by_phase(f.taps_x, 1, y, x);
            const Axis none = {1, 1, 1, 1, 0, 1};
            taps_y_ = by_phase(f.taps_y, 1, none, y);
        } else {
            taps_x_ = by_phase(f.taps_x, y.taps, y, x);
        }
    }

    // Pixels that the taps reach along x: [low(), high()).
    int64_t low() const { return std::min<int64_t>(0, x.first(0)); }
    int64_t high() const { return std::max(x.in, x.first(x.out - 1) + x.reach()); }

    // Along x: rows of inputs -> a row of outputs. One row, or y.reach() of them if not separable.
    void along_x(Vec<T>* out, const Vec<T>* const* rows, int64_t phase_y) const {
        const int64_t num_rows = separable ? 1 : y.reach(), per_phase = num_rows * x.reach();
        for (int64_t p = 0; p < std::min(x.up, x.out); p++) {
            const T* taps = taps_x_.data() + ((separable ? 0 : phase_y * x.up) + x.phase(p)) * per_phase;
            fir<T>(out + p, x.up, rows, num_rows, x.first(p), taps, x.reach(), x.down, (x.out - p + x.up - 1) / x.up);
        }
    }

    // Along y: `width` values of y.reach() rows, from one column on -> a row.
    void along_y(Vec<T>* out, const Vec<T>* const* rows, int64_t phase_y, int64_t from, int64_t width) const {
        fir<T>(out, 1, rows, y.reach(), from, taps_y_.data() + phase_y * y.reach(), 1, 1, width);
    }

    Axis x, y;
    bool separable;

   private:
    // [phase of y][phase of x][rows][reach]; rows are the taps of that phase of y, where there are any.
    static std::vector<T> by_phase(const double* taps, int64_t taps_y, const Axis& y, const Axis& x) {
        const int64_t phases_y = taps_y > 1 ? y.up : 1, rows = taps_y > 1 ? y.reach() : 1;
        std::vector<T> sorted(phases_y * x.up * rows * x.reach(), T(0));
        for (int64_t ky = 0; ky < taps_y; ky++)
            for (int64_t kx = 0; kx < x.taps; kx++) {
                const int64_t row = (ky % phases_y * x.up + kx % x.up) * rows + ky / phases_y;
                sorted[row * x.reach() + kx / x.up] = T(taps[ky * x.taps + kx]);
            }
        return sorted;
    }

    std::vector<T> taps_x_, taps_y_;
};

// The last rows of a stack, by number. Rows outside the stack are zeros, as are pixels outside [0, width) of a row.
template <class T> class Rows {
   public:
    Rows(Scratch& scratch, int64_t height, int64_t low, int64_t high, int64_t capacity)
        : height_(height), low_(low), length_(high - low), capacity_(capacity),
          values_(scratch.take<Vec<T>>(length_ * (capacity + 1))), window_(scratch.take<const Vec<T>*>(capacity)) {}

    Vec<T>* row(int64_t y) { return values_ + y % capacity_ * length_ - low_; }

    // `capacity` rows from `first` on.
    const Vec<T>* const* window(int64_t first) {
        for (int64_t i = 0; i < capacity_; i++)
            window_[i] = first + i >= 0 && first + i < height_ ? row(first + i) : values_ + capacity_ * length_ - low_;
        return window_;
    }

   private:
    int64_t height_, low_, length_, capacity_;
    Vec<T>* values_;
    const Vec<T>** window_;
};

// Input rows of a filter, loaded when they are needed, and the filtered rows. Rows are asked for in ascending order.
template <class S> class Resampled {
    using T = Compute<S>;

   public:
    Resampled(Scratch& scratch, const Filter<T>& filter, PlaneBlock<S>& source)
        : f_(filter), source_(source), rows_(scratch, filter.y.in, filter.low(), filter.high(), filter.y.reach()),
          row_(scratch.take<Vec<T>>(filter.high() - filter.low())) {}

    // Row t of the result: [f.x.out].
    void produce(int64_t t, Vec<T>* out) {
        const int64_t first = f_.y.first(t), end = std::min(f_.y.in, first + f_.y.reach());
        for (next_ = std::max(next_, first); next_ < end; next_++) source_.load(next_, rows_.row(next_));
        const Vec<T>* const* rows = rows_.window(first);
        if (!f_.separable) return f_.along_x(out, rows, f_.y.phase(t));
        f_.along_y(row_, rows, f_.y.phase(t), f_.low(), f_.high() - f_.low());
        const Vec<T>* row = row_ - f_.low();
        f_.along_x(out, &row, 0);
    }

   private:
    const Filter<T>& f_;
    PlaneBlock<S>& source_;
    Rows<T> rows_;
    Vec<T>* row_;
    int64_t next_ = 0;
};

//----------------------------------------------------------------------------
// Work is cut into blocks of planes, and these into bands of rows where there are few blocks.

constexpr int64_t kMinBand = 16, kMinItems = 32;

template <int lanes, class F> void for_each_band(int64_t planes, int64_t rows, F work) {
    const int64_t blocks = (planes + lanes - 1) / lanes;
    const int64_t bands = std::clamp<int64_t>(blocks ? kMinItems / blocks : 1, 1, std::max<int64_t>(rows / kMinBand, 1));
    auto body = [=, &work](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            work(i / bands, i % bands * rows / bands, (i % bands + 1) * rows / bands);
    };
    stylesan_parallel_for(blocks * bands, 1,
                          [](int64_t begin, int64_t end, void* f) { (*static_cast<decltype(body)*>(f))(begin, end); },
                          &body);
}

//----------------------------------------------------------------------------

template <class S> void resample(const StylesanImages& x, const StylesanImages& y, const StylesanFilter& f) {
    const Filter<Compute<S>> filter(f);
    for_each_band<kLanes<Compute<S>>>(x.n * x.c, y.h, [&](int64_t block, int64_t begin, int64_t end) {
        Scratch scratch;
        PlaneBlock<S> source(x, block, nullptr), target(y, block, nullptr);
        Resampled<S> resampled(scratch, filter, source);
        auto* row = scratch.take<Vec<Compute<S>>>(y.w);
        for (int64_t o = begin; o < end; o++) {
            resampled.produce(o, row);
            target.store(o, row);
        }
    });
}

//----------------------------------------------------------------------------
// Between the filters of the leaky ReLU a row of the upsampled planes lives, never a plane.

template <class T, int mode>
void activate_row(Vec<T>* row, int64_t width, int32_t* codes, T slope_, T limit_) {
    using V = Vec<T>;
    using I = typename VectorOf<T>::Code;
    using Stored = typename VectorOf<T>::StoredCode;
    constexpr int lanes = kLanes<T>;
    const V slope = V{} + slope_, limit = V{} + limit_;
    auto word = [&](V* at, int64_t count, int32_t* code) __attribute__((always_inline)) {
        I bits = {};
        Stored stored;
        if (mode == kReadCodes) {
            std::memcpy(&stored, code, sizeof(stored));
            bits = __builtin_convertvector(stored, I);
        }
#pragma GCC unroll 16
        for (int q = 0; q < count; q++) {
            if (mode == kReadCodes) {
                at[q] = apply_code<I, V>(bits >> (kBitsPerCode * q), at[q], slope);
            } else {
                const V activated = leaky<V>(at[q], slope);
                if (mode == kActivateAndKeep) bits |= code_of<I, V>(at[q], activated, limit) << (kBitsPerCode * q);
                at[q] = bounded<V>(activated, limit);
            }
        }
        if (mode == kActivateAndKeep) {
            stored = __builtin_convertvector(bits, Stored);
            std::memcpy(code, &stored, sizeof(stored));
        }
    };
    int64_t t = 0;
    for (; t + kCodesPerWord <= width; t += kCodesPerWord) word(row + t, kCodesPerWord, codes + t / kCodesPerWord * lanes);
    if (t < width) word(row + t, width - t, codes + t / kCodesPerWord * lanes);
}

template <class S>
void filtered_lrelu(const StylesanImages& x, const void* bias, const StylesanImages& y, const StylesanLayer& layer) {
    using T = Compute<S>;
    using V = Vec<T>;
    const Filter<T> up(layer.up), down(layer.down);
    const int64_t width = up.x.out, height = up.y.out, words = (width + kCodesPerWord - 1) / kCodesPerWord;
    auto* activate = layer.mode == kActivate ? activate_row<T, kActivate>
        : layer.mode == kActivateAndKeep ? activate_row<T, kActivateAndKeep> : activate_row<T, kReadCodes>;
    constexpr int lanes = kLanes<T>;
    for_each_band<lanes>(x.n * x.c, y.h, [&](int64_t block, int64_t begin, int64_t end) {
        Scratch scratch;
        PlaneBlock<S> source(x, block, static_cast<const S*>(bias)), target(y, block, nullptr);
        Resampled<S> upsampled(scratch, up, source);
        // Rows are downsampled along x as soon as they are there, if they can be.
        const int64_t low = down.low(), high = down.high();
        V *row = scratch.take<V>(high - low), *result = scratch.take<V>(y.w);
        Rows<T> rows(scratch, height, down.separable ? 0 : low, down.separable ? down.x.out : high, down.y.reach());
        int32_t* all = static_cast<int32_t*>(layer.codes.data);
        int32_t* codes = all ? all + block * height * words * lanes : nullptr;
        // Bands share rows. The first that needs a row writes its codes, the others into a place that nobody reads.
        int32_t* unread = scratch.take<int32_t>(words * lanes);
        const int64_t mine = end == y.h ? height : down.y.first(end);
        int64_t t = 0;
        for (int64_t o = begin; o < end; o++) {
            const int64_t first = down.y.first(o), last = std::min(height, first + down.y.reach());
            for (t = std::max(t, first); t < last; t++) {
                V* values = down.separable ? row - low : rows.row(t);
                upsampled.produce(t, values);
                const bool write = layer.mode != kActivateAndKeep || t < mine;
                activate(values, width, codes && write ? codes + t * words * lanes : unread, T(layer.slope),
                         T(layer.clamp));
                const V* const_values = values;
                if (down.separable) down.along_x(rows.row(t), &const_values, 0);
            }
            const V* const* window = rows.window(first);
            if (down.separable) {
                down.along_y(result, window, down.y.phase(o), 0, y.w);
            } else {
                down.along_x(result, window, down.y.phase(o));
            }
            target.store(o, result);
        }
    });
}

//----------------------------------------------------------------------------

// at(value, g) for every element. `along`: the bias runs along the innermost dimension.
template <class S, int order, class F> void for_each_element(const StylesanBiasAct& a, F at) {
    using T = Compute<S>;
    const S *x = static_cast<const S*>(a.x), *b = static_cast<const S*>(a.b), *g = static_cast<const S*>(a.g);
    S* out = static_cast<S*>(a.out);
    const bool along = a.inner == 1;
    const int64_t length = along ? a.channels : a.inner, rows = along ? a.outer : a.outer * a.channels;
    auto body = [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const S *xr = x + r * length, *gr = order ? g + r * length : nullptr;
            S* to = out + r * length;
            const T shared = b && !along ? to_compute(b[r % a.channels]) : T(0);
            if (along && b) {
#pragma GCC ivdep
                for (int64_t i = 0; i < length; i++)
                    to[i] = to_storage<S>(at(to_compute(xr[i]) + to_compute(b[i]), order ? to_compute(gr[i]) : T(0)));
            } else {
#pragma GCC ivdep
                for (int64_t i = 0; i < length; i++)
                    to[i] = to_storage<S>(at(to_compute(xr[i]) + shared, order ? to_compute(gr[i]) : T(0)));
            }
        }
    };
    constexpr int64_t kGrain = 1 << 15;
    stylesan_parallel_for(rows, std::max<int64_t>(kGrain / std::max<int64_t>(length, 1), 1),
                          [](int64_t begin, int64_t end, void* f) { (*static_cast<decltype(body)*>(f))(begin, end); },
                          &body);
}

template <class S, int order> void bias_act(const StylesanBiasAct& a) {
    using T = Compute<S>;
    // The linear activation is a leaky ReLU with the slope 1.
    const ActivationSettings<T> s = {a.act == kLinear ? T(1) : T(a.alpha), T(a.gain), T(a.clamp)};
    const int act = a.act;
    if (order < 2 && (act == kLrelu || act == kLinear))
        return for_each_element<S, order>(a, [=](T x, T g) { return bias_act_at<kLrelu, order, T>(act, x, g, s); });
    // Next to an exponential the choice per element costs nothing.
    for_each_element<S, order>(a, [=](T x, T g) { return bias_act_at<-1, order, T>(act, x, g, s); });
}

}  // namespace stylesan

//----------------------------------------------------------------------------
// Called from Python. 0 is success, -1 a type that the compiler does not have.

using namespace stylesan;

extern "C" int stylesan_resample(int32_t type, const StylesanImages* x, const StylesanImages* y,
                                 const StylesanFilter* f) {
    return with_type(type, [=](auto s) { resample<decltype(s)>(*x, *y, *f); }) - 1;
}

extern "C" int stylesan_filtered_lrelu(int32_t type, const StylesanImages* x, const void* bias,
                                       const StylesanImages* y, const StylesanLayer* layer) {
    return with_type(type, [=](auto s) { filtered_lrelu<decltype(s)>(*x, bias, *y, *layer); }) - 1;
}

extern "C" int stylesan_bias_act(int32_t type, const StylesanBiasAct* arguments) {
    return with_type(type, [=](auto s) {
        using S = decltype(s);
        const auto run = arguments->order == 0 ? bias_act<S, 0> : arguments->order == 1 ? bias_act<S, 1> : bias_act<S, 2>;
        run(*arguments);
    }) - 1;
}
