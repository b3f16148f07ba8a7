// SPDX-License-Identifier: Apache-2.0
// The programs of GPUs with several threads per block and several blocks beside each other, for ThreadSanitizer: it sees
// threads that touch the same memory without a barrier between them, as words of codes that two blocks write. Results
// have to be those of one thread. The exit status is 0 if all is well (test_strips.py).
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

static thread_local std::barrier<>* barrier_of_block = nullptr;
#define STYLESAN_SYNC() do { if (barrier_of_block) barrier_of_block->arrive_and_wait(); } while (0)

#include "strips.h"
#include "tiles.h"

static int threads_per_block = 1;
constexpr int kBlocksAtOnce = 2;

namespace stylesan {

inline int processors() { return 2; }

template <class Program> void run_block(int64_t index, size_t shared_bytes, const Program& program) {
    std::vector<double> memory(shared_bytes / sizeof(double) + 2, std::nan(""));
    std::barrier<> barrier(threads_per_block);
    std::vector<std::thread> threads;
    for (int t = 0; t < threads_per_block; t++)
        threads.emplace_back([&, t] {
            barrier_of_block = &barrier;
            program(Block{index, t, threads_per_block, reinterpret_cast<char*>(memory.data())});
        });
    for (std::thread& thread : threads) thread.join();
}

template <class Program> int launch(int64_t blocks, size_t shared_bytes, void*, const Program& program) {
    std::atomic<int64_t> left{blocks};      // The last block comes first.
    std::vector<std::thread> processors;
    for (int i = 0; i < kBlocksAtOnce; i++)
        processors.emplace_back([&] {
            for (int64_t index; (index = left.fetch_sub(1, std::memory_order_relaxed) - 1) >= 0;)
                run_block(index, shared_bytes, program);
        });
    for (std::thread& processor : processors) processor.join();
    return 0;
}

}  // namespace stylesan

using stylesan::Axis;

static StylesanImages images(void* data, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
    if (channels_last) return {data, n, c, h, w, h * w * c, 1, w * c, c};
    return {data, n, c, h, w, c * h * w, h * w, w, 1};
}

static std::vector<double> some_taps(int count, int seed) {
    std::vector<double> taps(count);
    for (int i = 0; i < count; i++) taps[i] = std::sin(1 + 1.7 * i + seed);
    return taps;
}

static Axis transposed(const Axis& a) { return {a.out, a.in, a.down, a.up, a.taps - 1 - a.pad, a.taps}; }

struct Case {
    int up, down, up_taps, down_taps, phase;
    bool radial;        // The downsampling filter.
};

// Result, codes and gradient, one after the other. Kind and Gradient: void for the general program.
template <class Kind, class Gradient> std::vector<float> run_layer(const Case& of, int h, int w, bool channels_last) {
    const int n = 2, c = 5, low = of.phase + 2 * of.up;
    const std::vector<double> up = some_taps(of.up_taps, 0);
    const std::vector<double> down = some_taps(of.radial ? of.down_taps * of.down_taps : of.down_taps, 5);
    const Axis ux{w, w * of.up + low + 9 - of.up_taps + 1, of.up, 1, low, of.up_taps};
    const Axis uy{h, h * of.up + low + 8 - of.up_taps + 1, of.up, 1, low, of.up_taps};
    const Axis dx{ux.out, (ux.out - of.down_taps) / of.down + 1, 1, of.down, 0, of.down_taps};
    const Axis dy{uy.out, (uy.out - of.down_taps) / of.down + 1, 1, of.down, 0, of.down_taps};
    const int64_t words = (ux.out + 15) / 16;
    std::vector<float> x(n * c * h * w), bias(c), y(n * c * dy.out * dx.out), gradient(x.size());
    std::vector<int32_t> codes(n * c * uy.out * words);
    for (size_t i = 0; i < x.size(); i++) x[i] = float(2 * std::sin(0.37 * double(i)));
    for (int i = 0; i < c; i++) bias[i] = float(std::cos(i));

    const double* down_y = of.radial ? nullptr : down.data();
    StylesanLayer layer = {{up.data(), up.data(), ux, uy}, {down.data(), down_y, dx, dy}, 0.2, 2.5,
                           images(codes.data(), n, c, uy.out, words, channels_last), kActivateAndKeep};
    const StylesanImages in = images(x.data(), n, c, h, w, channels_last);
    const StylesanImages out = images(y.data(), n, c, dy.out, dx.out, channels_last);
    const StylesanImages back = images(gradient.data(), n, c, h, w, channels_last);
    StylesanLayer gradient_layer = layer;       // With taps that are not mirrored: any will do.
    gradient_layer.up = {down.data(), down_y, transposed(dx), transposed(dy)};
    gradient_layer.down = {up.data(), up.data(), transposed(ux), transposed(uy)};
    gradient_layer.mode = kReadCodes;
    int code;
    if constexpr (std::is_same_v<Kind, void>) {
        code = stylesan::filtered_lrelu_tiles<float>(in, bias.data(), out, layer, nullptr);
        code = code ? code : stylesan::filtered_lrelu_tiles<float>(out, nullptr, back, gradient_layer, nullptr);
    } else {
        code = stylesan::filtered_lrelu_strips<float, Kind>(in, bias.data(), out, layer, nullptr);
        code = code ? code : stylesan::filtered_lrelu_strips<float, Gradient>(out, nullptr, back, gradient_layer, nullptr);
    }
    if (code) return {};
    y.insert(y.end(), gradient.begin(), gradient.end());
    for (int32_t word : codes) y.push_back(float(word & 0xffff)), y.push_back(float(word >> 16));
    return y;
}

template <class Kind, class Gradient> bool is_same(const char* name, const Case& of, int h, int w) {
    bool good = true;
    for (bool channels_last : {false, true}) {
        threads_per_block = 1;
        const std::vector<float> want = run_layer<Kind, Gradient>(of, h, w, channels_last);
        threads_per_block = 4;
        const bool same = !want.empty() && run_layer<Kind, Gradient>(of, h, w, channels_last) == want;
        if (!same) std::printf("%s, %dx%d, %s: other results\n", name, h, w, channels_last ? "channels last" : "contiguous");
        good = good && same;
    }
    return good;
}

int main() {
    using namespace stylesan;
    const Case c22{2, 2, 12, 12, 1, false}, c42{4, 2, 24, 12, 2, false}, c42d{4, 2, 24, 12, 2, true};
    bool good = true;
    good &= is_same<Strips22, Strips22>("22", c22, 9, 21);
    good &= is_same<Strips42, Strips24>("42", c42, 21, 9);
    good &= is_same<void, void>("general 4/2, radial", c42d, 9, 13);
    good &= is_same<void, void>("general 3/1", {3, 1, 7, 5, 1, false}, 14, 17);
    good &= is_same<void, void>("general 1/3", {1, 3, 5, 2, 1, false}, 44, 57);
    return good ? 0 : 1;
}
