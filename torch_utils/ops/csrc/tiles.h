// SPDX-License-Identifier: Apache-2.0
// The operations as programs of a block of threads with a piece of shared memory. `cuda.cu` runs them on a GPU.
// `emulate.cpp` runs the same programs with one thread per block on a processor: so the tests check what a GPU computes.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "block.h"

namespace stylesan {

constexpr int kThreads = 256, kMaxTaps = 432, kSharedBytes = 48 << 10;     // Taps are arguments of a kernel: 4 KB.

#ifdef __CUDA_ARCH__
#define STYLESAN_SYNC() __syncthreads()
#elif !defined(STYLESAN_SYNC)       // A test has several threads per block and makes them wait.
#define STYLESAN_SYNC()
#endif

// Divisions take a GPU longer than all else here, so that rates which are powers of two are shifted by.
struct TileAxis : AxisOf<int32_t> {
    int up_shift;       // -1: the rate is no power of two.

    STYLESAN_FN int first(int o) const {
        return up_shift < 0 ? AxisOf<int32_t>::first(o) : (o * down - pad + up - 1) >> up_shift;
    }
};

inline TileAxis narrow(const Axis& a) {
    TileAxis axis = {};
    axis.in = int32_t(a.in), axis.out = int32_t(a.out), axis.up = int32_t(a.up), axis.down = int32_t(a.down);
    axis.pad = int32_t(a.pad), axis.taps = int32_t(a.taps);
    axis.up_shift = -1;
    for (int shift = 0; shift < 8; shift++)
        if (axis.up == 1 << shift) axis.up_shift = shift;
    return axis;
}

// f(row, column) for all of a rectangle, shared between the threads of a block: neighbours take neighbouring columns.
template <class F> STYLESAN_FN void for_each(const Block& block, int rows, int columns, F f) {
    int shift = 0;
    while (1 << shift < columns && 2 << shift <= block.threads) shift++;
    const int across = 1 << shift;
    for (int row = block.thread >> shift; row < rows; row += block.threads >> shift)
        for (int column = block.thread & (across - 1); column < columns; column += across) f(row, column);
}

// A stretch of samples along an axis.
struct Span {
    int begin, count;
    STYLESAN_FN int end() const { return begin + count; }
};

// What outputs see, and how much `count` of them see at most.
STYLESAN_FN Span seen(const TileAxis& a, Span o) {
    const int begin = a.first(o.begin);
    return {begin, a.first(o.end() - 1) + a.reach() - begin};
}
inline int seen_at_most(const TileAxis& a, int count) { return ((count - 1) * a.down + a.up - 1) / a.up + a.reach(); }

struct TileFilter {
    TileAxis x, y;
    int taps_x, taps_y;     // Where they begin in the array of taps. taps_y -1: not separable, taps_x [y.taps, x.taps].
    STYLESAN_FN bool separable() const { return taps_y >= 0; }
};

//----------------------------------------------------------------------------
// Tiles in shared memory are [height, width, planes].

// One output of a filter along one axis, `step` values between neighbours. `in` begins with what the first output of the
// tile sees, number `begin`.
template <class T>
STYLESAN_FN T filter_line(const TileAxis& a, const T* taps, const T* in, int begin, int o, int step) {
    const int first = a.first(o), phase = first * a.up + a.pad - o * a.down;
    const T* from = in + (first - begin) * step;
    T sum = T(0);
    for (int tap = phase; tap < a.taps; tap += a.up, from += step) sum += taps[tap] * *from;
    return sum;
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

// Images, and the planes that a block works on: neighbours in memory if channels come last, else one.
struct Planes {
    StylesanImages images;
    int per_block;

    STYLESAN_FN int64_t offset(int64_t plane) const {
        const uint32_t channels = uint32_t(images.c), image = uint32_t(plane) / channels;
        return image * images.stride_n + (uint32_t(plane) - image * channels) * images.stride_c;
    }
    STYLESAN_FN int64_t count() const { return images.n * images.c; }
    // Values of a tile lie as [row, column of the image, plane]; a column of the image is so many bits of their number.
    STYLESAN_FN int shift() const { return per_block == 8 ? 3 : per_block == 4 ? 2 : per_block == 2 ? 1 : 0; }
};

template <class S>
STYLESAN_FN void load_tile(const Block& block, const Planes& p, const S* bias, int64_t plane0, Span x, Span y,
                           Compute<S>* tile) {
    const S* data = static_cast<const S*>(p.images.data);
    const int s = p.shift();
    for_each(block, y.count, x.count << s, [&](int row, int column) {
        const int k = column & (p.per_block - 1), ix = (column >> s) + x.begin, iy = row + y.begin;
        const int64_t plane = plane0 + k;
        Compute<S> value(0);
        if (ix >= 0 && ix < p.images.w && iy >= 0 && iy < p.images.h && plane < p.count()) {
            value = to_compute(data[p.offset(plane) + iy * p.images.stride_h + ix * p.images.stride_w]);
            if (bias) value += to_compute(bias[uint32_t(plane) % uint32_t(p.images.c)]);
        }
        tile[((row * x.count) << s) + column] = value;
    });
}

template <class S>
STYLESAN_FN void store_tile(const Block& block, const Planes& p, int64_t plane0, Span x, Span y,
                            const Compute<S>* tile) {
    S* data = static_cast<S*>(p.images.data);
    const int s = p.shift();
    for_each(block, y.count, x.count << s, [&](int row, int column) {
        const int k = column & (p.per_block - 1), ix = (column >> s) + x.begin, iy = row + y.begin;
        if (plane0 + k < p.count())
            data[p.offset(plane0 + k) + iy * p.images.stride_h + ix * p.images.stride_w] =
                to_storage<S>(tile[((row * x.count) << s) + column]);
    });
}

// Both axes, x first. `temp` holds [in_y.count, x.count, planes].
template <class T>
STYLESAN_FN void filter_both(const Block& block, const TileFilter& f, const T* taps, const T* in, Span in_x, Span in_y,
                             T* temp, T* out, Span x, Span y, int planes, int s) {
    if (f.separable()) {
        for_each(block, in_y.count, x.count << s, [&](int row, int column) {
            temp[((row * x.count) << s) + column] =
                filter_line(f.x, taps + f.taps_x, in + ((row * in_x.count) << s) + (column & (planes - 1)), in_x.begin,
                            x.begin + (column >> s), planes);
        });
        STYLESAN_SYNC();
        for_each(block, y.count, x.count << s, [&](int row, int column) {
            out[((row * x.count) << s) + column] =
                filter_line(f.y, taps + f.taps_y, temp + column, in_y.begin, y.begin + row, x.count << s);
        });
    } else {
        for_each(block, y.count, x.count << s, [&](int row, int column) {
            out[((row * x.count) << s) + column] =
                filter_point(f, taps + f.taps_x, in, in_x, in_y, x.begin + (column >> s), y.begin + row,
                             column & (planes - 1), planes);
        });
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
    static constexpr int kBlockThreads = kThreads;
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
        filter_both(block, filter, taps.values, memory, ix, iy, memory + at_temp, memory + at_out, ox, oy, x.per_block,
                    x.shift());
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
                return launch(groups * program.grid.tiles_x * program.grid.tiles_y, bytes, stream, program);
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
// Filtered leaky ReLU of any rates.

template <class S> struct LayerProgram {
    using T = Compute<S>;
    static constexpr int kBlockThreads = kThreads;
    Planes x, y;
    const S* bias;
    TileFilter up, down;
    Grid grid;
    int at_first, at_second;    // Shared memory: inputs (then upsampled values, if filters are separable), halfway.
    int at_upsampled, at_downsampled;
    T slope, clamp;
    StylesanImages codes;
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
        filter_both(block, up, taps.values, memory + at_first, ix, iy, memory + at_second, upsampled, ux, uy, k,
                    x.shift());
        STYLESAN_SYNC();
        if (mode == kActivateAndKeep) {
            write_codes(block, plane0, ox, oy, ux, uy, upsampled);
            STYLESAN_SYNC();
        }
        activate_tile(block, plane0, ux, uy, upsampled);
        STYLESAN_SYNC();
        filter_both(block, down, taps.values, upsampled, ux, uy, memory + at_second, out, ox, oy, k, x.shift());
        STYLESAN_SYNC();
        store_tile<S>(block, y, plane0, ox, oy, out);
    }

    STYLESAN_FN int32_t* word_at(int64_t plane, int row, int word) const {
        const uint32_t channels = uint32_t(x.images.c), image = uint32_t(plane) / channels;
        return static_cast<int32_t*>(codes.data) + image * codes.stride_n +
            (uint32_t(plane) - image * channels) * codes.stride_c + row * codes.stride_h + word * codes.stride_w;
    }

    // Values outside the upsampled planes are zeros; the downsampling filter must see nothing else there.
    STYLESAN_FN void activate_tile(const Block& block, int64_t plane0, Span ux, Span uy, T* values) const {
        const int s = x.shift();
        for_each(block, uy.count, ux.count << s, [&](int row, int column) {
            const int64_t plane = plane0 + (column & (x.per_block - 1));
            const int tx = (column >> s) + ux.begin, ty = row + uy.begin;
            const bool inside = tx >= 0 && tx < up.x.out && ty >= 0 && ty < up.y.out && plane < x.count();
            T& value = values[((row * ux.count) << s) + column];
            if (!inside) {
                value = T(0);
            } else if (mode == kReadCodes) {
                const int code = *word_at(plane, ty, tx / kCodesPerWord) >> (kBitsPerCode * (tx % kCodesPerWord));
                value = apply_code<int, T>(code, value, slope);
            } else {
                value = bounded(leaky(value, slope), clamp);
            }
        });
    }

    // A tile owns the values from the first that it sees up to the first that the next tile sees: whole words, because
    // tiles begin at multiples of sixteen. What no output sees gets the code 0, which nobody reads.
    STYLESAN_FN void write_codes(const Block& block, int64_t plane0, Span ox, Span oy, Span ux, Span uy,
                                 const T* values) const {
        const int s = x.shift();
        const int end_x = ox.end() == grid.width ? up.x.out : down.x.first(ox.end());
        const int end_y = oy.end() == grid.height ? up.y.out : down.y.first(oy.end());
        const int word0 = ux.begin / kCodesPerWord, words = (end_x + kCodesPerWord - 1) / kCodesPerWord - word0;
        for_each(block, end_y - uy.begin, words << s, [&](int line, int column) {
            const int k = column & (x.per_block - 1), word = word0 + (column >> s), row = uy.begin + line;
            if (plane0 + k >= x.count()) return;
            uint32_t bits = 0;      // Unsigned: the highest code reaches the sign.
            for (int q = 0; q < kCodesPerWord; q++) {
                const int tx = word * kCodesPerWord + q;
                if (tx >= ux.end() || row >= uy.end()) continue;
                const T value = values[(((row - uy.begin) * ux.count + tx - ux.begin) << s) + k];
                bits |= uint32_t(code_of<int, T>(value, leaky(value, slope), clamp)) << (kBitsPerCode * q);
            }
            *word_at(plane0 + k, row, word) = int32_t(bits);
        });
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

// How the values of a pack find their biases. To divide once per value would take longer than to fetch it.
enum BiasOfPack { kNoBias, kOneChannel, kNeighbours, kAnyChannels };

// kAct -1: `act` says which activation.
template <class S, int kPack, int order, int kAct> struct BiasActProgram {
    using T = Compute<S>;
    using P = Pack<S, kPack>;
    static constexpr int kBlockThreads = kThreads;
    StylesanBiasAct a;
    ActivationSettings<T> settings;
    int bias_of_pack;

    STYLESAN_FN void operator()(const Block& block) const {
        const int64_t count = a.outer * a.channels * a.inner;
        for (int t = block.thread; t < kThreads; t += block.threads) {
            const int64_t start = (block.index * kThreads + t) * kPack;
            if (start < count) at(uint32_t(start));
        }
    }

    STYLESAN_FN void at(uint32_t start) const {
        const uint32_t inner = uint32_t(a.inner), channels = uint32_t(a.channels);
        const S *x = static_cast<const S*>(a.x), *b = static_cast<const S*>(a.b), *g = static_cast<const S*>(a.g);
        const P in = *reinterpret_cast<const P*>(x + start);
        P slopes = in, biases = in, result;
        if (order) slopes = *reinterpret_cast<const P*>(g + start);
        switch (bias_of_pack) {
            case kOneChannel: {
                const S shared = b[start / inner % channels];
                for (int q = 0; q < kPack; q++) biases.values[q] = shared;
                break;
            }
            case kNeighbours: biases = *reinterpret_cast<const P*>(b + start % channels); break;
            case kAnyChannels:
                for (int q = 0; q < kPack; q++) biases.values[q] = b[(start + q) / inner % channels];
                break;
            default: break;
        }
        for (int q = 0; q < kPack; q++) {
            const T value = to_compute(in.values[q]) + (bias_of_pack == kNoBias ? T(0) : to_compute(biases.values[q]));
            result.values[q] = to_storage<S>(bias_act_at<kAct, order, T>(
                a.act, value, order ? to_compute(slopes.values[q]) : T(0), settings));
        }
        *reinterpret_cast<P*>(static_cast<S*>(a.out) + start) = result;
    }
};

template <class S, int kPack> int bias_act_packs(const StylesanBiasAct& a, void* stream) {
    using T = Compute<S>;
    // The linear activation is a leaky ReLU with the slope 1.
    const bool straight = a.order < 2 && (a.act == kLinear || a.act == kLrelu);
    const ActivationSettings<T> settings = {straight && a.act == kLinear ? T(1) : T(a.alpha), T(a.gain), T(a.clamp)};
    const int64_t count = a.outer * a.channels * a.inner, per_block = int64_t(kThreads) * kPack;
    const int64_t blocks = (count + per_block - 1) / per_block;
    const bool aligned = reinterpret_cast<uintptr_t>(a.b) % sizeof(Pack<S, kPack>) == 0;
    const int bias = !a.b ? kNoBias : a.inner % kPack == 0 ? kOneChannel
        : a.inner == 1 && a.channels % kPack == 0 && aligned ? kNeighbours : kAnyChannels;
    if (straight && a.order == 0) return launch(blocks, 0, stream, BiasActProgram<S, kPack, 0, kLrelu>{a, settings, bias});
    if (straight) return launch(blocks, 0, stream, BiasActProgram<S, kPack, 1, kLrelu>{a, settings, bias});
    if (a.order == 0) return launch(blocks, 0, stream, BiasActProgram<S, kPack, 0, -1>{a, settings, bias});
    if (a.order == 1) return launch(blocks, 0, stream, BiasActProgram<S, kPack, 1, -1>{a, settings, bias});
    return launch(blocks, 0, stream, BiasActProgram<S, kPack, 2, -1>{a, settings, bias});
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
