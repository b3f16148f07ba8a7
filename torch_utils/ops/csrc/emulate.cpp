// SPDX-License-Identifier: Apache-2.0
// The programs of GPUs on a processor, one thread per block, for tests. What threads could do to each other between two
// synchronisations is not seen here.
#include <vector>

#include "strips.h"
#include "tiles.h"

namespace stylesan {

inline int processors() { return 2; }

template <class Program>
int launch(int64_t blocks, size_t shared_bytes, void*, const Program& program) {
    std::vector<double> memory(shared_bytes / sizeof(double) + 2);
    for (int64_t i = 0; i < blocks; i++) {
        for (double& value : memory) value = __builtin_nan("");     // As if other blocks had been there.
        program(Block{i, 0, 1, reinterpret_cast<char*>(memory.data())});
    }
    return 0;
}

template <class Kind>
int strips_of_any_type(int32_t type, const StylesanImages& x, const void* bias, const StylesanImages& y,
                       const StylesanLayer& layer) {
    int code = kNoSuchType;
    with_type(type, [&](auto s) { code = filtered_lrelu_strips<decltype(s), Kind>(x, bias, y, layer, nullptr); });
    return code;
}

}  // namespace stylesan

// As in strips.cu, for all types.
#define STYLESAN_EMULATE(name)                                                                                       \
    extern "C" int stylesan_strips_##name(int32_t type, const StylesanImages* x, const void* bias,                   \
                                          const StylesanImages* y, const StylesanLayer* layer, void*) {              \
        return stylesan::strips_of_any_type<stylesan::Strips##name>(type, *x, bias, *y, *layer);                     \
    }
STYLESAN_EMULATE(22)
STYLESAN_EMULATE(42)
STYLESAN_EMULATE(24)
STYLESAN_EMULATE(22D)
STYLESAN_EMULATE(42D)
STYLESAN_EMULATE(22U)
STYLESAN_EMULATE(24U)
