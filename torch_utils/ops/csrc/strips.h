// SPDX-License-Identifier: Apache-2.0
// Filtered leaky ReLU for rates and numbers of taps that are known when it is compiled: what the recipes use.
//
// A thread owns one channel and kWidth neighbouring columns of the result and goes down the rows. The last rows of its
// inputs are in registers, and so are the sums of the results that are not complete: there is no shared memory, no
// barrier and no division, and every index is known to the compiler. Taps are arguments of the kernel, which multiply-add
// instructions read for nothing. Neighbouring threads own neighbouring channels where channels come last in memory, and
// neighbouring columns where they do not. Work at the borders of a strip is done twice: a result needs 12 x 12 upsampled
// values, and eight neighbours need 26 x 12.
#pragma once
#include <algorithm>

#include "block.h"

namespace stylesan {

constexpr int kStripThreads = 128, kStripBlocks = 2;    // Blocks of so many threads with 255 registers fill a processor.
constexpr int kOverheadRows = 6;        // What a chunk of rows costs beside its own, in rows.
constexpr int kMaxChunks = 32;

STYLESAN_FN constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Of the bits of a code, those that make a value 0, for all values of a word.
constexpr uint32_t kAllBounded = 0xaaaaaaaau;

// Upsampling by kUp with kUpTaps taps, downsampling by kDown with kDownTaps; radial filters are not separable. kPhase is
// the tap that the first upsampled column of a strip takes of its first input.
template <int kUp_, int kDown_, int kUpTaps_, int kDownTaps_, int kPhase_, bool kUpRadial_, bool kDownRadial_>
struct Rates {
    static constexpr int kUp = kUp_, kDown = kDown_, kUpTaps = kUpTaps_, kDownTaps = kDownTaps_, kPhase = kPhase_;
    static constexpr bool kUpRadial = kUpRadial_, kDownRadial = kDownRadial_;
    static constexpr int kUpReach = kUpTaps / kUp;          // Inputs that an upsampled value sees along an axis.
    static constexpr int kDownReach = kDownTaps / kDown;    // Results that see an upsampled value.
    static constexpr int kUpValues = kUpRadial ? kUpTaps * kUpTaps : kUpTaps;
    static constexpr int kDownValues = kDownRadial ? kDownTaps * kDownTaps : kDownTaps;
    // Rows are taken in groups of kUp that see the same inputs; the first group begins so many rows early.
    static constexpr int kEarly = kUp - 1 - kPhase;
    // Chunks of rows begin at multiples of this, so that the phase is the same for all.
    static constexpr int kRowUnit = kUp > kDown ? kUp / kDown : 1;
    static_assert(kUpTaps % kUp == 0 && kDownTaps % kDown == 0 && kEarly < kDown && kRowUnit * kDown % kUp == 0);

    // The upsampled column k of a strip: its first input, from that of column 0, and the tap for it.
    STYLESAN_FN static constexpr int input(int k) { return (k - kPhase + kUp - 1) / kUp; }
    STYLESAN_FN static constexpr int tap(int k) { return input(k) * kUp + kPhase - k; }
};

template <class S, class R, int kMode, int kWidth, int kUnroll> struct StripProgram {
    using T = Compute<S>;
    static constexpr int kBlockThreads = kStripThreads;
    static constexpr int kUpsampled = (kWidth - 1) * R::kDown + R::kDownTaps;       // Columns.
    static constexpr int kInputs = R::input(kUpsampled - 1) + R::kUpReach;          // Columns.
    static constexpr int kWords = (kUpsampled + kCodesPerWord - 1) / kCodesPerWord;
    // One turn of the loop: kUnroll rows of inputs, kRows upsampled rows, kFinished rows of the result. Results are
    // numbered from the oldest one that is not complete when the turn begins.
    static constexpr int kRows = kUnroll * R::kUp, kFinished = kRows / R::kDown;
    static constexpr int kOldest = floor_div(-R::kEarly, R::kDown) - (R::kDownReach - 1);
    static constexpr int kSums = floor_div(kRows - 1 - R::kEarly, R::kDown) - kOldest + 1;
    static_assert(kInputs <= 32);
    static_assert(kRows % R::kDown == 0 && kWidth * R::kDown % R::kUp == 0);
    // A strip writes the codes of this many columns, which is a whole number of bytes; the last strip those after it, too.
    static constexpr int kOwnCodes = kWidth * R::kDown;
    static_assert(kMode != kActivateAndKeep || kOwnCodes == 8 || kOwnCodes == 16);
    static constexpr bool kHasBias = kMode != kReadCodes;
    using Code = std::conditional_t<kOwnCodes == 8, uint16_t, uint32_t>;

    StylesanImages x, y, codes;
    const S* bias;
    int up_pad_x, up_pad_y, down_pad_x, down_pad_y;
    int up_width, up_height;        // Of the upsampled images.
    int64_t row_bytes;              // From one row of the inputs to the next, and from one column.
    int column_bytes;
    int strips, chunks, chunk_rows;
    int channels_are_neighbours;    // In memory.
    T slope, clamp;
    T up[R::kUpValues], down[R::kDownValues];       // The same along both axes; or [y, x] of a radial filter.

    STYLESAN_FN void operator()(const Block& block) const {
        for (int t = block.thread; t < kStripThreads; t += block.threads)
            run(uint32_t(block.index) * kStripThreads + uint32_t(t));
    }

    struct Place {
        const char* inputs;         // Of this plane, in the first column that the strip sees.
        uint32_t columns;           // A bit for each that lies in the image.
        WideBits<S> nothing;        // What stands for values outside the image: with the bias it gives 0.
        T bias;
    };

    // One row of inputs, with bias. Nothing is fetched ahead of its use: the registers are needed, and while one group of
    // threads waits another one computes.
    STYLESAN_FN void load(const Place& at, int row, T* values) const {
        const uint32_t columns = row >= 0 && row < int(x.h) ? at.columns : 0;
        const char* from = at.inputs + int64_t(row) * row_bytes;
        WideBits<S> bits[kInputs];
#pragma unroll
        for (int c = 0; c < kInputs; c++)
            bits[c] = load_or<S>(from + int64_t(c) * column_bytes, columns >> c & 1, kHasBias ? at.nothing : 0);
#pragma unroll
        for (int c = 0; c < kInputs; c++) values[c] = to_compute(from_bits<S>(bits[c])) + (kHasBias ? at.bias : T(0));
    }

    STYLESAN_FN void run(uint32_t index) const {
        const uint32_t channels = uint32_t(x.c);
        uint32_t c, n, strip, chunk;
        if (channels_are_neighbours) {
            c = index % channels, index /= channels;
            strip = index % strips, index /= strips;
            chunk = index % chunks, n = index / chunks;
        } else {
            strip = index % strips, index /= strips;
            chunk = index % chunks, index /= chunks;
            c = index % channels, n = index / channels;
        }
        if (n >= uint32_t(x.n)) return;
        const int first_result = int(chunk) * chunk_rows, end_result = min_of(first_result + chunk_rows, int(y.h));
        if (first_result >= end_result) return;

        // The upsampled columns of the strip begin at `column`, its upsampled rows are [first_row, end_row).
        const int column = int(strip) * kOwnCodes - down_pad_x;
        const int wanted_row = first_result * R::kDown - down_pad_y;
        const int end_wanted = (end_result - 1) * R::kDown - down_pad_y + R::kDownTaps;
        const int first_row = max_of(wanted_row, 0), end_row = min_of(end_wanted, up_height);
        const int end_own = end_result == int(y.h) ? up_height : end_result * R::kDown - down_pad_y;

        Place at;
        const int first_column = (column + R::kPhase - up_pad_x) / R::kUp;
        at.inputs = static_cast<const char*>(x.data) + (n * x.stride_n + c * x.stride_c) * int64_t(sizeof(S)) +
            int64_t(first_column) * column_bytes;
        at.columns = 0;
        for (int i = 0; i < kInputs; i++) at.columns |= uint32_t(first_column + i >= 0 && first_column + i < int(x.w)) << i;
        at.bias = bias ? to_compute(bias[c]) : T(0);
        at.nothing = to_bits(to_storage<S>(-at.bias));
        S* result = static_cast<S*>(y.data) + n * y.stride_n + c * y.stride_c + strip * kWidth * y.stride_w;
        int32_t* code = kMode == kActivate ? nullptr
            : static_cast<int32_t*>(codes.data) + n * codes.stride_n + c * codes.stride_c;

        // Codes are read from whole words. Columns outside the image count as bounded: their values become 0.
        const int word = floor_div(column, kCodesPerWord), shift = kBitsPerCode * (column - word * kCodesPerWord);
        uint32_t outside[kWords];
#pragma unroll
        for (int i = 0; i < kWords; i++) outside[i] = kMode == kReadCodes ? outside_word(column + i * kCodesPerWord) : 0;

        int row = wanted_row - R::kEarly, oldest = first_result + kOldest;
        int input_row = (row + R::kUp - 1 - up_pad_y) / R::kUp;
        T window[R::kUpReach - 1 + kUnroll][kInputs], sums[kSums][kWidth];
#pragma unroll
        for (int r = 0; r < R::kUpReach - 1; r++) load(at, input_row + r, window[r]);
#pragma unroll
        for (int r = 0; r < kSums; r++)
#pragma unroll
            for (int o = 0; o < kWidth; o++) sums[r][o] = T(0);
        input_row += R::kUpReach - 1;

#pragma unroll 1
        for (; row < end_wanted; row += kRows) {
#pragma unroll
            for (int u = 0; u < kUnroll; u++) {
                load(at, input_row++, window[R::kUpReach - 1 + u]);
#pragma unroll
                for (int k = 0; k < R::kUp; k++) {
                    const int here = row + u * R::kUp + k;
                    const int from_early = u * R::kUp + k - R::kEarly;
                    const int period = floor_div(from_early, R::kDown), phase = from_early - period * R::kDown;
                    if (here >= first_row && here < end_row)
                        add_row(window, u, k, sums, period - kOldest, phase, code, here, word, shift, outside, strip,
                                here < end_own);
                    if (phase == R::kDown - 1) {
                        const int done = period - (R::kDownReach - 1) - kOldest, o = oldest + done;
                        if (o >= first_result && o < end_result) store(result + o * y.stride_h, strip, sums[done]);
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < R::kUpReach - 1; r++)
#pragma unroll
                for (int i = 0; i < kInputs; i++) window[r][i] = window[r + kUnroll][i];
#pragma unroll
            for (int r = 0; r < kSums; r++)
#pragma unroll
                for (int o = 0; o < kWidth; o++) sums[r][o] = r + kFinished < kSums ? sums[r + kFinished][o] : T(0);
            oldest += kFinished;
        }
    }

    // Upsampled row k of the inputs window[u..], activated and added to the results that see it; `newest` is the last of
    // these, `phase` the tap that it has for the row.
    STYLESAN_FN void add_row(const T (*window)[kInputs], int u, int k, T (*sums)[kWidth], int newest, int phase,
                             int32_t* code, int row, int word, int shift, const uint32_t* outside, uint32_t strip,
                             bool is_own) const {
        uint32_t bits[kWords];
        if (kMode == kReadCodes) read_codes(code + row * codes.stride_h, word, shift, outside, bits);
        if (kMode == kActivateAndKeep)
#pragma unroll
            for (int i = 0; i < kWords; i++) bits[i] = 0;
        T between[kInputs], halfway[kWidth];
        const int tap_y = R::kUp - 1 - k;
        if constexpr (!R::kUpRadial) {
#pragma unroll
            for (int i = 0; i < kInputs; i++) {
                between[i] = T(0);
#pragma unroll
                for (int j = 0; j < R::kUpReach; j++) between[i] += up[tap_y + j * R::kUp] * window[u + j][i];
            }
        }
#pragma unroll
        for (int o = 0; o < kWidth; o++) halfway[o] = T(0);
#pragma unroll
        for (int t = 0; t < kUpsampled; t++) {
            T value = T(0);
            if (R::kUpRadial) {
#pragma unroll
                for (int j = 0; j < R::kUpReach; j++)
#pragma unroll
                    for (int i = 0; i < R::kUpReach; i++)
                        value += up[(tap_y + j * R::kUp) * R::kUpTaps + R::tap(t) + i * R::kUp] *
                            window[u + j][R::input(t) + i];
            } else {
#pragma unroll
                for (int i = 0; i < R::kUpReach; i++) value += up[R::tap(t) + i * R::kUp] * between[R::input(t) + i];
            }
            const int w = t / kCodesPerWord, q = kBitsPerCode * (t % kCodesPerWord);
            if (kMode == kReadCodes) {
                value = apply_code<uint32_t, T>(bits[w] >> q, value, slope);
            } else if (kMode == kActivateAndKeep) {
                if (!(value > T(0))) value *= slope, bits[w] |= uint32_t(kNegative) << q;
                if (std::fabs(value) > clamp) value = std::copysign(clamp, value), bits[w] |= uint32_t(kBounded) << q;
            } else {
                value = tightly_bounded(gentle_leaky(value, slope), clamp);
            }
#pragma unroll
            for (int o = 0; o < kWidth; o++) {
                const int tap = t - o * R::kDown;
                if (tap < 0 || tap >= R::kDownTaps) continue;
                if constexpr (!R::kDownRadial) halfway[o] += down[tap] * value;
                if constexpr (R::kDownRadial)
#pragma unroll
                for (int j = 0; j < R::kDownReach; j++)
                    sums[newest - j][o] += down[(phase + j * R::kDown) * R::kDownTaps + tap] * value;
            }
        }
        if (!R::kDownRadial) {
#pragma unroll
            for (int j = 0; j < R::kDownReach; j++)
#pragma unroll
                for (int o = 0; o < kWidth; o++)
                    sums[newest - j][o] += down[phase + j * R::kDown] * halfway[o];
        }
        if (kMode == kActivateAndKeep && is_own) write_codes(code + row * codes.stride_h, strip, bits);
    }

    STYLESAN_FN void store(S* to, uint32_t strip, const T* values) const {
#pragma unroll
        for (int o = 0; o < kWidth; o++)
            store_if<S>(to + o * y.stride_w, strip * kWidth + o < uint32_t(y.w), to_storage<S>(values[o]));
    }

    //------------------------------------------------------------------------
    // Codes of an upsampled row: words of sixteen columns.

    // Which of sixteen columns from `column` on lie outside the upsampled image.
    STYLESAN_FN uint32_t outside_word(int column) const {
        uint32_t bits = 0;
        for (int q = 0; q < kCodesPerWord; q++)
            if (column + q < 0 || column + q >= up_width) bits |= uint32_t(kBounded) << (kBitsPerCode * q);
        return bits;
    }

    STYLESAN_FN void read_codes(const int32_t* of_row, int word, int shift, const uint32_t* outside,
                                uint32_t* bits) const {
        const int last = int(codes.w) - 1;
        uint32_t low = uint32_t(of_row[max_of(min_of(word, last), 0) * codes.stride_w]);
#pragma unroll
        for (int i = 0; i < kWords; i++) {
            const uint32_t high = uint32_t(of_row[max_of(min_of(word + i + 1, last), 0) * codes.stride_w]);
            bits[i] = funnel_shift(low, high, shift) | outside[i];
            low = high;
        }
    }

    // A strip owns the columns up to the next one; the last strip of a row all that follow.
    STYLESAN_FN void write_codes(int32_t* of_row, uint32_t strip, const uint32_t* bits) const {
        constexpr int kPerWord = kCodesPerWord / kOwnCodes;
        constexpr int kUnits = (kUpsampled + kOwnCodes - 1) / kOwnCodes;
        const int units = int(codes.w) * kPerWord;
#pragma unroll
        for (int i = 0; i < kUnits; i++) {
            const int unit = int(strip) + i;
            if (unit >= units || (i > 0 && int(strip) != strips - 1)) continue;
            Code* to = reinterpret_cast<Code*>(of_row + unit / kPerWord * codes.stride_w) + unit % kPerWord;
            *to = Code(bits[i / kPerWord] >> (i % kPerWord * kBitsPerCode * kOwnCodes));
        }
    }
};

//----------------------------------------------------------------------------

// The rates of the recipes (torch_utils/ops/strips.py holds the same table), and how wide strips are and how many rows of
// inputs a turn of the loop takes: as much as registers hold on all GPUs. D and U: radial downsampling, radial upsampling.
template <class R_, int kWidth_, int kUnroll_, bool kOnlyGradients_> struct Strips {
    using R = R_;
    static constexpr int kWidth = kWidth_, kUnroll = kUnroll_;
    static constexpr bool kOnlyGradients = kOnlyGradients_;
};
using Strips22 = Strips<Rates<2, 2, 12, 12, 1, false, false>, 8, 2, false>;
using Strips42 = Strips<Rates<4, 2, 24, 12, 2, false, false>, 8, 1, false>;
using Strips24 = Strips<Rates<2, 4, 12, 24, 0, false, false>, 3, 2, true>;      // The gradient of 42.
using Strips22D = Strips<Rates<2, 2, 12, 12, 1, false, true>, 8, 2, false>;
using Strips42D = Strips<Rates<4, 2, 24, 12, 2, false, true>, 8, 1, false>;
using Strips22U = Strips<Rates<2, 2, 12, 12, 1, true, false>, 8, 2, true>;      // The gradient of 22D.
using Strips24U = Strips<Rates<2, 4, 12, 24, 0, true, false>, 2, 2, true>;      // The gradient of 42D.

// Radial, or separable with the same taps along both axes.
inline bool has_taps(const StylesanFilter& f, bool radial) {
    if (radial || f.taps_y == nullptr) return radial && f.taps_y == nullptr;
    return f.x.taps == f.y.taps && std::equal(f.taps_x, f.taps_x + f.x.taps, f.taps_y);
}

template <class R> bool fits(const StylesanFilter& up, const StylesanFilter& down) {
    auto axis = [](const Axis& a, int64_t u, int64_t d, int64_t taps) { return a.up == u && a.down == d && a.taps == taps; };
    auto has_phase = [](const Axis& u, const Axis& d) {
        const int64_t distance = R::kPhase - d.pad - u.pad;
        return distance % R::kUp == 0;
    };
    return axis(up.x, R::kUp, 1, R::kUpTaps) && axis(up.y, R::kUp, 1, R::kUpTaps) &&
        axis(down.x, 1, R::kDown, R::kDownTaps) && axis(down.y, 1, R::kDown, R::kDownTaps) &&
        has_taps(up, R::kUpRadial) && has_taps(down, R::kDownRadial) &&
        has_phase(up.x, down.x) && has_phase(up.y, down.y);
}

template <class T> void copy_taps(const StylesanFilter& f, T* values) {
    const int64_t count = f.taps_y ? f.x.taps : f.x.taps * f.y.taps;
    for (int64_t i = 0; i < count; i++) values[i] = T(f.taps_x[i]);
}

// Rows are cut into chunks where there are too few planes and strips to fill the GPU.
inline int choose_chunks(int64_t threads, int64_t rows) {
    const int64_t at_once = int64_t(processors()) * kStripBlocks * kStripThreads;
    int best = 1;
    int64_t best_cost = 0;
    for (int chunks = 1; chunks <= kMaxChunks && chunks <= rows; chunks++) {
        const int64_t per_chunk = (rows + chunks - 1) / chunks + kOverheadRows;
        const int64_t cost = (threads * chunks + at_once - 1) / at_once * per_chunk;
        if (best_cost == 0 || cost < best_cost) best = chunks, best_cost = cost;
    }
    return best;
}

template <class S, class R, int kMode, int kWidth, int kUnroll>
int launch_strips(const StylesanImages& x, const void* bias, const StylesanImages& y, const StylesanLayer& layer,
                  void* stream) {
    StripProgram<S, R, kMode, kWidth, kUnroll> program = {};
    program.x = x, program.y = y, program.codes = layer.codes;
    program.bias = static_cast<const S*>(bias);
    program.up_pad_x = int(layer.up.x.pad), program.up_pad_y = int(layer.up.y.pad);
    program.down_pad_x = int(layer.down.x.pad), program.down_pad_y = int(layer.down.y.pad);
    program.up_width = int(layer.up.x.out), program.up_height = int(layer.up.y.out);
    program.slope = Compute<S>(layer.slope), program.clamp = Compute<S>(layer.clamp);
    copy_taps(layer.up, program.up);
    copy_taps(layer.down, program.down);
    program.channels_are_neighbours = x.stride_c == 1 && x.stride_w != 1 && x.c > 1;
    program.row_bytes = x.stride_h * int64_t(sizeof(S)), program.column_bytes = int(x.stride_w * int64_t(sizeof(S)));
    program.strips = int((y.w + kWidth - 1) / kWidth);
    const int64_t threads = x.n * x.c * program.strips;
    const int chunks = choose_chunks(threads, y.h);
    program.chunk_rows = int((y.h + chunks - 1) / chunks + R::kRowUnit - 1) / R::kRowUnit * R::kRowUnit;
    program.chunks = int((y.h + program.chunk_rows - 1) / program.chunk_rows);
    return launch((threads * program.chunks + kStripThreads - 1) / kStripThreads, 0, stream, program);
}

// Runs the layer if it has these rates. Slopes above 1 and codes of cropped images are left to the general program.
template <class S, class V>
int filtered_lrelu_strips(const StylesanImages& x, const void* bias, const StylesanImages& y,
                          const StylesanLayer& layer, void* stream) {
    using R = typename V::R;
    if (!fits<R>(layer.up, layer.down)) return kNoSuchProgram;
    if (layer.mode == kReadCodes)
        return launch_strips<S, R, kReadCodes, V::kWidth, V::kUnroll>(x, bias, y, layer, stream);
    if constexpr (!V::kOnlyGradients) {
        if (layer.slope > 1 || layer.down.x.pad || layer.down.y.pad) return kNoSuchProgram;
        if (layer.mode == kActivate)
            return launch_strips<S, R, kActivate, V::kWidth, V::kUnroll>(x, bias, y, layer, stream);
        return launch_strips<S, R, kActivateAndKeep, V::kWidth, V::kUnroll>(x, bias, y, layer, stream);
    }
    return kNoSuchProgram;
}

}  // namespace stylesan
