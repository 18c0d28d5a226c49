// The CPU kernels for one level: x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "kernels.h"

// After the standard headers, so that nothing shared with other files is compiled for this level.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SSD_LEVEL avx2
#define SSD_FMA 1
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace ssd {
const Kernels& avx2_kernels() { return avx2::kLevel; }
}  // namespace ssd
#endif  // __x86_64__
