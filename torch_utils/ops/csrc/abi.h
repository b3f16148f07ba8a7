// SPDX-License-Identifier: Apache-2.0
// Arguments that Python passes by pointer (torch_utils/ops/native.py holds the same structures). Strides and counts are
// in elements.
#pragma once
#include <cstdint>

#include "formulas.h"

extern "C" {

enum StylesanType { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Images [n, c, h, w] in any layout.
struct StylesanImages {
    void* data;
    int64_t n, c, h, w, stride_n, stride_c, stride_h, stride_w;
};

// taps_y null: taps_x holds [taps of y, taps of x], not separable.
struct StylesanFilter {
    const double *taps_x, *taps_y;
    stylesan::Axis x, y;
};

enum StylesanMode { kActivate, kActivateAndKeep, kReadCodes };

struct StylesanLayer {
    StylesanFilter up, down;
    double slope, clamp;    // clamp: infinity for none.
    // Written by kActivateAndKeep, read by kReadCodes: int32 [n, c, rows, words of sixteen columns] of the upsampled planes.
    // Processors have a layout of their own and look at the pointer only.
    StylesanImages codes;
    int32_t mode;
};

struct StylesanBiasAct {
    const void *x, *b, *g;      // b null: no bias. g null exactly at order 0.
    void* out;
    int64_t outer, channels, inner;     // x [outer, channels, inner], contiguous.
    double alpha, gain, clamp;
    int32_t act, order;
};

}
