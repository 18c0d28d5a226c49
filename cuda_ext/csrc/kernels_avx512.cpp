// The CPU kernels for one level: x86-64 with AVX-512, VNNI and BF16.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

// After the standard headers, so that nothing shared with other files is compiled for this level.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#define SSD_LEVEL avx512
#define SSD_AVX512 1
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace ssd {
const Kernels& avx512_kernels() { return avx512::kLevel; }
}  // namespace ssd
#endif  // __x86_64__
