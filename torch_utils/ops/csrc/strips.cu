// SPDX-License-Identifier: Apache-2.0
// One kind of strips for one type of values: STYLESAN_STRIPS names it ("22"), STYLESAN_TYPE the type.
#include "launch.h"
#include "strips.h"

namespace stylesan {
using Float = float;
}

#define STYLESAN_JOIN_(a, b) a##b
#define STYLESAN_JOIN(a, b) STYLESAN_JOIN_(a, b)

extern "C" int STYLESAN_JOIN(stylesan_strips_, STYLESAN_STRIPS)(int32_t type, const StylesanImages* x,
                                                                const void* bias, const StylesanImages* y,
                                                                const StylesanLayer* layer, void* stream) {
    using Kind = stylesan::STYLESAN_JOIN(Strips, STYLESAN_STRIPS);
    if (type != stylesan::code_of_type<stylesan::STYLESAN_TYPE>()) return stylesan::kNoSuchType;
    return stylesan::filtered_lrelu_strips<stylesan::STYLESAN_TYPE, Kind>(*x, bias, *y, *layer, stream);
}
