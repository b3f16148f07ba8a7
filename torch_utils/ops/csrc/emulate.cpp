// SPDX-License-Identifier: Apache-2.0
// The programs of tiles.h on a processor, one thread per block, for tests. What threads could do to each other between
// two synchronisations is not seen here.
#include <cstddef>
#include <cstdint>
#include <vector>

namespace stylesan {
template <class Program> int launch(int64_t blocks, int threads, size_t shared_bytes, void* stream, const Program& p);
}

#include "tiles.h"

namespace stylesan {

template <class Program>
int launch(int64_t blocks, int, size_t shared_bytes, void*, const Program& program) {
    std::vector<double> memory(shared_bytes / sizeof(double) + 2);
    for (int64_t i = 0; i < blocks; i++) {
        for (double& value : memory) value = __builtin_nan("");     // As if other blocks had been there.
        program(Block{i, 0, 1, reinterpret_cast<char*>(memory.data())});
    }
    return 0;
}

}  // namespace stylesan
