// SPDX-License-Identifier: Apache-2.0
// The programs of tiles.h on a GPU.
#include "launch.h"
#include "tiles.h"
