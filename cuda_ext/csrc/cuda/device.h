// What a kernel needs of its device: qualifiers, atomics, shared memory, launches. Under SSD_EMULATE the same kernels
// are host functions that tests run block by block (tests/emulator/launcher.h).
#pragma once

#include <cstdint>

#ifdef SSD_EMULATE
#include "launcher.h"

#define SSD_KERNEL static void
#define SSD_DEVICE static inline
#define SSD_BOUNDS(threads)
#define SSD_SHARED(type, name) type& name = *static_cast<type*>(emulator::shared_memory(sizeof(type), alignof(type)))
#define SSD_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator::dynamic_shared_memory())
#define SSD_DEVICE_GLOBAL static
#define SSD_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  emulator::launch(grid, threads, shared_bytes, [&] { kernel(__VA_ARGS__); })
#else
#include <cuda_runtime.h>

#define SSD_KERNEL static __global__ void
#define SSD_DEVICE static __device__ __forceinline__
#define SSD_BOUNDS(threads) __launch_bounds__(threads)
#define SSD_SHARED(type, name) __shared__ type name
#define SSD_DYNAMIC_SHARED(type, name)                    \
  extern __shared__ __align__(16) unsigned char memory_[]; \
  type* name = reinterpret_cast<type*>(memory_)
#define SSD_DEVICE_GLOBAL static __device__
#define SSD_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif
