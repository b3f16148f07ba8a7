// SPDX-License-Identifier: Apache-2.0
// The operations as programs of a block of threads with a piece of shared memory. `cuda.cu` runs them on a GPU.
// `emulate.cpp` runs the same programs with one thread per block on a processor: so the tests check what a GPU computes.
// Needed from the includer, before this file: template <class Program> int launch(int64_t blocks, int threads,
// size_t shared_bytes, void* stream, const Program& program), 0 for success.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "storage.h"

namespace stylesan {

// Why a call failed, beside the codes of CUDA, which are positive.
constexpr int kNoSuchType = -1, kTooManyTaps = -2, kTileTooLarge = -3;
constexpr int kThreads = 256, kMaxTaps = 432, kSharedBytes = 48 << 10;     // Taps are arguments of a kernel: 4 KB.

#ifdef __CUDA_ARCH__
#define STYLESAN_SYNC() __syncthreads()
#else
#define STYLESAN_SYNC()
#endif

struct Block {
    int64_t index;
    int thread, threads;
    char* memory;
};

using Axis32 = AxisOf<int32_t>;

STYLESAN_FN Axis32 narrow(const Axis& a) {
    return {int32_t(a.in), int32_t(a.out), int32_t(a.up), int32_t(a.down), int32_t(a.pad), int32_t(a.taps)};
}

// A stretch of samples along an axis.
struct Span {
    int begin, count;
    STYLESAN_FN int end() const { return begin + count; }
};

// What outputs see, and how much `count` of them see at most.
STYLESAN_FN Span seen(const Axis32& a, Span o) {
    const int begin = a.first(o.begin);
    return {begin, a.first(o.end() - 1) + a.reach() - begin};
}
inline int seen_at_most(const Axis32& a, int count) { return ((count - 1) * a.down + a.up - 1) / a.up + a.reach(); }

struct TileFilter {
    Axis32 x, y;
    int taps_x, taps_y;     // Where they begin in the array of taps. taps_y -1: not separable, taps_x [y.taps, x.taps].
    STYLESAN_FN bool separable() const { return taps_y >= 0; }
};

//----------------------------------------------------------------------------
// Tiles in shared memory are [height, width, planes].

// One axis of a filter: `in` covers the rows or columns `in_span`, `out` those of `out_span`; `across` is the number of
// values between neighbours along the axis, `lines` the number of stretches beside each other in front of that.
template <class T>
STYLESAN_FN void filter_tile(const Block& block, const Axis32& a, const T* taps, const T* in, Span in_span, T* out,
                             Span out_span, int lines, int across) {
    for (int i = block.thread; i < lines * out_span.count * across; i += block.threads) {
        const int c = i % across, o = i / across % out_span.count, line = i / across / out_span.count;
        const int first = a.first(out_span.begin + o), phase = first * a.up + a.pad - (out_span.begin + o) * a.down;
        const T* from = in + (line * in_span.count + first - in_span.begin) * across + c;
        T sum = T(0);
        for (int tap = phase; tap < a.taps; tap += a.up, from += across) sum += taps[tap] * *from;
        out[i] = sum;
    }
}

// One output of a filter that is not separable.
template <class T>
STYLESAN_FN T filter_point(const TileFilter& f, const T* taps, const T* in, Span in_x, Span in_y, int ox, int oy, int k,
                           int planes) {
    const int x0 = f.x.first(ox), y0 = f.y.first(oy), px = f.x.phase(ox), py = f.y.phase(oy);
    T sum = T(0);
    for (int ky = py, y = y0 - in_y.begin; ky < f.y.taps; ky += f.y.up, y++)
        for (int kx = px, x = x0 - in_x.begin; kx < f.x.taps; kx += f.x.up, x++)
            sum += taps[ky * f.x.taps + kx] * in[(y * in_x.count + x) * planes + k];
    return sum;
}

// Both axes, x first. `temp` holds [in_y.count, x.count, planes].
template <class T>
STYLESAN_FN void filter_both(const Block& block, const TileFilter& f, const T* taps, const T* in, Span in_x, Span in_y,
                             T* temp, T* out, Span x, Span y, int planes) {
    if (f.separable()) {
        filter_tile(block, f.x, taps + f.taps_x, in, in_x, temp, x, in_y.count, planes);
        STYLESAN_SYNC();
        filter_tile(block, f.y, taps + f.taps_y, temp, in_y, out, y, 1, x.count * planes);
    } else {
        for (int i = block.thread; i < x.count * y.count * planes; i += block.threads) {
            const int k = i % planes, ox = i / planes % x.count, oy = i / planes / x.count;
            out[i] = filter_point(f, taps + f.taps_x, in, in_x, in_y, x.begin + ox, y.begin + oy, k, planes);
        }
    }
}

// Images, and the planes that a block works on: neighbours in memory if channels come last, else one.
struct Planes {
    StylesanImages images;
    int per_block;

    STYLESAN_FN int64_t offset(int64_t plane) const {
        return plane / images.c * images.stride_n + plane % images.c * images.stride_c;
    }
    STYLESAN_FN int64_t count() const { return images.n * images.c; }
};

template <class S>
STYLESAN_FN void load_tile(const Block& block, const Planes& p, const S* bias, int64_t plane0, Span x, Span y,
                           Compute<S>* tile) {
    const S* data = static_cast<const S*>(p.images.data);
    for (int i = block.thread; i < x.count * y.count * p.per_block; i += block.threads) {
        const int k = i % p.per_block, ix = i / p.per_block % x.count + x.begin, iy = i / p.per_block / x.count + y.begin;
        const int64_t plane = plane0 + k;
        Compute<S> value(0);
        if (ix >= 0 && ix < p.images.w && iy >= 0 && iy < p.images.h && plane < p.count()) {
            value = to_compute(data[p.offset(plane) + iy * p.images.stride_h + ix * p.images.stride_w]);
            if (bias) value += to_compute(bias[plane % p.images.c]);
        }
        tile[i] = value;
    }
}

template <class S>
STYLESAN_FN void store_tile(const Block& block, const Planes& p, int64_t plane0, Span x, Span y,
                            const Compute<S>* tile) {
    S* data = static_cast<S*>(p.images.data);
    for (int i = block.thread; i < x.count * y.count * p.per_block; i += block.threads) {
        const int k = i % p.per_block, ix = i / p.per_block % x.count + x.begin, iy = i / p.per_block / x.count + y.begin;
        if (plane0 + k < p.count())
            data[p.offset(plane0 + k) + iy * p.images.stride_h + ix * p.images.stride_w] = to_storage<S>(tile[i]);
    }
}

//----------------------------------------------------------------------------
// Which part of the result a block computes.

struct Grid {
    int tile_x, tile_y, tiles_x, tiles_y;
    int width, height;

    STYLESAN_FN int64_t group(const Block& b) const { return b.index / (tiles_x * tiles_y); }
    STYLESAN_FN Span span_x(const Block& b) const { return cut(int(b.index % tiles_x), tile_x, width); }
    STYLESAN_FN Span span_y(const Block& b) const { return cut(int(b.index / tiles_x % tiles_y), tile_y, height); }
    STYLESAN_FN static Span cut(int tile, int size, int end) {
        const int begin = tile * size;
        return {begin, size < end - begin ? size : end - begin};
    }
};

inline Grid make_grid(const StylesanImages& y, int tile_x, int tile_y) {
    const int w = int(y.w), h = int(y.h);
    return {tile_x, tile_y, (w + tile_x - 1) / tile_x, (h + tile_y - 1) / tile_y, w, h};
}

// Planes per block: where channels are neighbours in memory, as many as fill a transaction of 32 bytes in float.
template <class S> int planes_per_block(const StylesanImages& x) {
    return x.stride_c == 1 && x.stride_w != 1 && x.c > 1 ? int(32 / sizeof(Compute<S>)) : 1;
}

template <class T> struct Taps {
    T values[kMaxTaps];
};

// Appends the taps of a filter; false if there are too many.
template <class T> bool add_filter(const StylesanFilter& f, TileFilter* filter, Taps<T>* taps, int* used) {
    const int64_t nx = f.taps_y ? f.x.taps : f.x.taps * f.y.taps, ny = f.taps_y ? f.y.taps : 0;
    if (*used + nx + ny > kMaxTaps) return false;
    *filter = {narrow(f.x), narrow(f.y), *used, f.taps_y ? *used + int(nx) : -1};
    for (int64_t i = 0; i < nx; i++) taps->values[(*used)++] = T(f.taps_x[i]);
    for (int64_t i = 0; i < ny; i++) taps->values[(*used)++] = T(f.taps_y[i]);
    return true;
}

//----------------------------------------------------------------------------
// Resampling.

template <class S> struct ResampleProgram {
    using T = Compute<S>;
    Planes x, y;
    TileFilter filter;
    Grid grid;
    int at_temp, at_out;    // In values from the start of shared memory, where the inputs are.
    Taps<T> taps;

    int64_t plan(int tile_x, int tile_y) {      // Bytes of shared memory.
        grid = make_grid(y.images, tile_x, tile_y);
        const int in_x = seen_at_most(filter.x, tile_x), in_y = seen_at_most(filter.y, tile_y), k = x.per_block;
        at_temp = in_x * in_y * k;
        at_out = at_temp + (filter.separable() ? tile_x * in_y * k : 0);
        return int64_t(at_out + tile_x * tile_y * k) * sizeof(T);
    }

    STYLESAN_FN void operator()(const Block& block) const {
        T* memory = reinterpret_cast<T*>(block.memory);
        const int64_t plane0 = grid.group(block) * x.per_block;
        const Span ox = grid.span_x(block), oy = grid.span_y(block), ix = seen(filter.x, ox), iy = seen(filter.y, oy);
        load_tile<S>(block, x, nullptr, plane0, ix, iy, memory);
        STYLESAN_SYNC();
        filter_both(block, filter, taps.values, memory, ix, iy, memory + at_temp, memory + at_out, ox, oy, x.per_block);
        STYLESAN_SYNC();
        store_tile<S>(block, y, plane0, ox, oy, memory + at_out);
    }
};

// Launch with the largest tile that fits, of fewer planes if it must be. Widths of tiles are multiples of `unit`.
template <class P> int launch_tiles(P& program, int unit, void* stream) {
    for (; program.x.per_block >= 1; program.x.per_block /= 2) {
        program.y.per_block = program.x.per_block;
        for (int tile_x = 32; tile_x >= unit; tile_x -= unit) {
            for (int tile_y = tile_x; tile_y >= (tile_x > unit ? tile_x : 1); tile_y /= 2) {
                const int64_t bytes = program.plan(tile_x, tile_y);
                if (bytes > kSharedBytes) continue;
                const int64_t groups = (program.x.count() + program.x.per_block - 1) / program.x.per_block;
                return launch(groups * program.grid.tiles_x * program.grid.tiles_y, kThreads, bytes, stream, program);
            }
        }
    }
    return kTileTooLarge;
}

template <class S>
int resample_tiles(const StylesanImages& x, const StylesanImages& y, const StylesanFilter& f, void* stream) {
    ResampleProgram<S> program = {};
    int used = 0;
    program.x = {x, planes_per_block<S>(x)};
    program.y = {y, program.x.per_block};
    if (!add_filter(f, &program.filter, &program.taps, &used)) return kTooManyTaps;
    return launch_tiles(program, 4, stream);
}

//----------------------------------------------------------------------------
// Filtered leaky ReLU. Codes: [plane][row of the upsampled plane][word], sixteen columns per word.

template <class S> struct LayerProgram {
    using T = Compute<S>;
    Planes x, y;
    const S* bias;
    TileFilter up, down;
    Grid grid;
    int at_first, at_second;    // Shared memory: inputs (then upsampled values, if filters are separable), halfway.
    int at_upsampled, at_downsampled;
    T slope, clamp;
    int32_t* codes;
    int mode;
    Taps<T> taps;

    int64_t plan(int tile_x, int tile_y) {
        grid = make_grid(y.images, tile_x, tile_y);
        const int k = x.per_block, ux = seen_at_most(down.x, tile_x), uy = seen_at_most(down.y, tile_y);
        const int ix = seen_at_most(up.x, ux), iy = seen_at_most(up.y, uy);
        const int inputs = ix * iy * k, between = ux * iy * k, upsampled = ux * uy * k, half = tile_x * uy * k;
        const int outputs = tile_x * tile_y * k;
        // Inputs are dead when upsampled values appear, unless they are made in one step; so is what lies halfway.
        at_first = 0;
        at_upsampled = up.separable() ? 0 : inputs;
        at_second = up.separable() ? std::max(inputs, upsampled) : inputs + upsampled;
        const int second = std::max(up.separable() ? between : 0, down.separable() ? half : 0);
        at_downsampled = at_second + second;
        return int64_t(at_downsampled + outputs) * sizeof(T);
    }

    STYLESAN_FN void operator()(const Block& block) const {
        T* memory = reinterpret_cast<T*>(block.memory);
        T *upsampled = memory + at_upsampled, *out = memory + at_downsampled;
        const int k = x.per_block;
        const int64_t plane0 = grid.group(block) * k;
        const Span ox = grid.span_x(block), oy = grid.span_y(block), ux = seen(down.x, ox), uy = seen(down.y, oy);
        const Span ix = seen(up.x, ux), iy = seen(up.y, uy);
        load_tile<S>(block, x, bias, plane0, ix, iy, memory + at_first);
        STYLESAN_SYNC();
        filter_both(block, up, taps.values, memory + at_first, ix, iy, memory + at_second, upsampled, ux, uy, k);
        STYLESAN_SYNC();
        if (mode == kActivateAndKeep) {
            write_codes(block, plane0, ox, oy, ux, uy, upsampled);
            STYLESAN_SYNC();
        }
        activate_tile(block, plane0, ux, uy, upsampled);
        STYLESAN_SYNC();
        filter_both(block, down, taps.values, upsampled, ux, uy, memory + at_second, out, ox, oy, k);
        STYLESAN_SYNC();
        store_tile<S>(block, y, plane0, ox, oy, out);
    }

    STYLESAN_FN int32_t* word_at(int64_t plane, int row, int word) const {
        const int words = (up.x.out + kCodesPerWord - 1) / kCodesPerWord;
        return codes + (plane * up.y.out + row) * words + word;
    }

    // Values outside the upsampled planes are zeros; the downsampling filter must see nothing else there.
    STYLESAN_FN void activate_tile(const Block& block, int64_t plane0, Span ux, Span uy, T* values) const {
        const int k = x.per_block;
        for (int i = block.thread; i < ux.count * uy.count * k; i += block.threads) {
            const int64_t plane = plane0 + i % k;
            const int tx = i / k % ux.count + ux.begin, ty = i / k / ux.count + uy.begin;
            const bool inside = tx >= 0 && tx < up.x.out && ty >= 0 && ty < up.y.out && plane < x.count();
            T value = T(0);
            if (inside && mode == kReadCodes) {
                const int code = *word_at(plane, ty, tx / kCodesPerWord) >> (kBitsPerCode * (tx % kCodesPerWord));
                value = apply_code<int, T>(code, values[i], slope);
            } else if (inside) {
                value = bounded(leaky(values[i], slope), clamp);
            }
            values[i] = value;
        }
    }

    // A tile owns the values from the first that it sees up to the first that the next tile sees: whole words, because
    // tiles begin at multiples of sixteen. What no output sees gets the code 0, which nobody reads.
    STYLESAN_FN void write_codes(const Block& block, int64_t plane0, Span ox, Span oy, Span ux, Span uy,
                                 const T* values) const {
        const int k = x.per_block;
        const int end_x = ox.end() == grid.width ? up.x.out : down.x.first(ox.end());
        const int end_y = oy.end() == grid.height ? up.y.out : down.y.first(oy.end());
        const int word0 = ux.begin / kCodesPerWord, words = (end_x + kCodesPerWord - 1) / kCodesPerWord - word0;
        for (int i = block.thread; i < words * (end_y - uy.begin) * k; i += block.threads) {
            const int64_t plane = plane0 + i % k;
            const int word = word0 + i / k % words, row = uy.begin + i / k / words;
            if (plane >= x.count()) continue;
            uint32_t bits = 0;      // Unsigned: the highest code reaches the sign.
            for (int q = 0; q < kCodesPerWord; q++) {
                const int tx = word * kCodesPerWord + q;
                if (tx >= ux.end() || row >= uy.end()) continue;
                const T value = values[((row - uy.begin) * ux.count + tx - ux.begin) * k + i % k];
                bits |= uint32_t(code_of<int, T>(value, leaky(value, slope), clamp)) << (kBitsPerCode * q);
            }
            *word_at(plane, row, word) = int32_t(bits);
        }
    }
};

template <class S>
int filtered_lrelu_tiles(const StylesanImages& x, const void* bias, const StylesanImages& y, const StylesanLayer& layer,
                         void* stream) {
    LayerProgram<S> program = {};
    int used = 0;
    program.x = {x, planes_per_block<S>(x)};
    program.y = {y, program.x.per_block};
    program.bias = static_cast<const S*>(bias);
    program.slope = Compute<S>(layer.slope);
    program.clamp = Compute<S>(layer.clamp);
    program.codes = layer.codes;
    program.mode = layer.mode;
    if (!add_filter(layer.up, &program.up, &program.taps, &used) ||
        !add_filter(layer.down, &program.down, &program.taps, &used))
        return kTooManyTaps;
    // Tiles of 16 / gcd(16, down) outputs begin at words of codes; of 4 where no codes are written.
    int unit = 4;
    if (layer.mode == kActivateAndKeep)
        while (unit * layer.down.x.down % kCodesPerWord) unit *= 2;
    return launch_tiles(program, unit, stream);
}

//----------------------------------------------------------------------------
// Bias and activation: kPack neighbours per thread, in one transaction.

template <class S, int kPack> struct alignas(sizeof(S) * kPack) Pack {
    S values[kPack];
};

template <class S, int kPack, int order> struct BiasActProgram {
    using T = Compute<S>;
    StylesanBiasAct a;
    ActivationSettings<T> settings;

    STYLESAN_FN void operator()(const Block& block) const {
        const int64_t count = a.outer * a.channels * a.inner;
        const uint32_t inner = uint32_t(a.inner), channels = uint32_t(a.channels);
        const S *x = static_cast<const S*>(a.x), *b = static_cast<const S*>(a.b), *g = static_cast<const S*>(a.g);
        for (int t = block.thread; t < kThreads; t += block.threads) {
            const int64_t start = (block.index * kThreads + t) * kPack;
            if (start >= count) return;
            Pack<S, kPack> in = *reinterpret_cast<const Pack<S, kPack>*>(x + start), slopes = in, result;
            if (order) slopes = *reinterpret_cast<const Pack<S, kPack>*>(g + start);
            for (int q = 0; q < kPack; q++) {
                const T bias = b ? to_compute(b[uint32_t(start + q) / inner % channels]) : T(0);
                result.values[q] = to_storage<S>(bias_act_at<-1, order, T>(
                    a.act, to_compute(in.values[q]) + bias, order ? to_compute(slopes.values[q]) : T(0), settings));
            }
            *reinterpret_cast<Pack<S, kPack>*>(static_cast<S*>(a.out) + start) = result;
        }
    }
};

template <class S, int kPack> int bias_act_packs(const StylesanBiasAct& a, void* stream) {
    using T = Compute<S>;
    const ActivationSettings<T> settings = {T(a.alpha), T(a.gain), T(a.clamp)};
    const int64_t count = a.outer * a.channels * a.inner, per_block = kThreads * kPack;
    const int64_t blocks = (count + per_block - 1) / per_block;
    if (a.order == 0) return launch(blocks, kThreads, 0, stream, BiasActProgram<S, kPack, 0>{a, settings});
    if (a.order == 1) return launch(blocks, kThreads, 0, stream, BiasActProgram<S, kPack, 1>{a, settings});
    return launch(blocks, kThreads, 0, stream, BiasActProgram<S, kPack, 2>{a, settings});
}

template <class S> int bias_act_tiles(const StylesanBiasAct& a, void* stream) {
    constexpr int kPack = 16 / sizeof(S);
    bool packs = a.outer * a.channels * a.inner % kPack == 0;
    for (const void* p : {a.x, a.g, static_cast<const void*>(a.out)})
        packs = packs && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    return packs ? bias_act_packs<S, kPack>(a, stream) : bias_act_packs<S, 1>(a, stream);
}

}  // namespace stylesan

//----------------------------------------------------------------------------
// Called from Python, with the stream in the end.

extern "C" int stylesan_resample(int32_t type, const StylesanImages* x, const StylesanImages* y,
                                 const StylesanFilter* f, void* stream) {
    int code = stylesan::kNoSuchType;
    stylesan::with_type(type, [&](auto s) { code = stylesan::resample_tiles<decltype(s)>(*x, *y, *f, stream); });
    return code;
}

extern "C" int stylesan_filtered_lrelu(int32_t type, const StylesanImages* x, const void* bias,
                                       const StylesanImages* y, const StylesanLayer* layer, void* stream) {
    int code = stylesan::kNoSuchType;
    stylesan::with_type(type, [&](auto s) {
        code = stylesan::filtered_lrelu_tiles<decltype(s)>(*x, bias, *y, *layer, stream);
    });
    return code;
}

extern "C" int stylesan_bias_act(int32_t type, const StylesanBiasAct* arguments, void* stream) {
    int code = stylesan::kNoSuchType;
    stylesan::with_type(type, [&](auto s) { code = stylesan::bias_act_tiles<decltype(s)>(*arguments, stream); });
    return code;
}
