// Runs a CUDA kernel on the host: block after block, a block's threads as fibers that switch at barriers.
//
// Threads run in an order that changes from barrier to barrier and blocks in a shuffled order, so that a missing
// barrier or a race between blocks shows as a wrong result. Shared memory starts as garbage. A barrier that only some
// threads of a block reach is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace emulator {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

struct Settings {
  int32_t threads = 32;  // most threads in a block; a power of two
  uint64_t seed = 0;
};
inline Settings settings;
inline int32_t threads_up_to(int32_t most) { return std::min(most, settings.threads); }

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = true, waits = false;
};

constexpr size_t kStackBytes = 256 << 10;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline uint32_t current = 0;
inline const std::function<void()>* body = nullptr;
inline Dim3 block_index, block_shape, grid_shape;
inline std::vector<std::unique_ptr<char[]>> held_memory;  // of the running block; exact sizes, for sanitizers
inline char *dynamic_memory = nullptr, *static_memory = nullptr;

inline char* garbage(size_t bytes) {
  held_memory.emplace_back(new char[bytes + 64]);
  char* begin = held_memory.back().get();
  begin += (64 - reinterpret_cast<uintptr_t>(begin) % 64) % 64;
  std::memset(begin, 0xA5, bytes);
  return begin;
}

// One static block of shared memory a kernel.
inline void* shared_memory(size_t bytes, size_t) {
  if (static_memory == nullptr) static_memory = garbage(bytes);
  return static_memory;
}
inline void* dynamic_shared_memory() { return dynamic_memory; }

inline void barrier() {
  Fiber& fiber = fibers[current];
  fiber.waits = true;
  swapcontext(&fiber.context, &scheduler);
}

inline void run_fiber() {
  (*body)();
  fibers[current].finished = true;
}

inline void run_block(uint32_t threads, std::mt19937_64& random) {
  if (fibers.size() < threads) fibers.resize(threads);
  std::vector<uint32_t> order(threads);
  for (uint32_t thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    fiber.finished = fiber.waits = false;
    makecontext(&fiber.context, run_fiber, 0);
    order[thread] = thread;
  }
  for (bool running = true; running;) {
    std::shuffle(order.begin(), order.end(), random);
    uint32_t waiting = 0;
    for (const uint32_t thread : order) {
      if (fibers[thread].finished) continue;
      current = thread;
      fibers[thread].waits = false;
      swapcontext(&scheduler, &fibers[thread].context);
      waiting += fibers[thread].waits && !fibers[thread].finished;
    }
    if (waiting != 0 && waiting != threads) {
      std::fprintf(stderr, "emulator: %u of %u threads wait at a barrier the others never reach\n", waiting, threads);
      std::abort();
    }
    running = waiting != 0;
  }
}

inline void launch(Dim3 grid, int32_t threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads < 1 || threads > 1024 || shared_bytes > 48 * 1024) {
    std::fprintf(stderr, "emulator: no device would accept this launch\n");
    std::abort();
  }
  std::mt19937_64 random(settings.seed);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random);
  grid_shape = grid;
  block_shape = {static_cast<uint32_t>(threads), 1, 1};
  body = &kernel;
  for (const uint64_t block : blocks) {
    block_index = {static_cast<uint32_t>(block % grid.x), static_cast<uint32_t>(block / grid.x), 0};
    held_memory.clear();
    static_memory = nullptr;
    dynamic_memory = garbage(static_cast<size_t>(shared_bytes));
    run_block(static_cast<uint32_t>(threads), random);
  }
}

}  // namespace emulator

#define threadIdx (emulator::thread_index_of_fiber())
#define blockIdx emulator::block_index
#define blockDim emulator::block_shape
#define gridDim emulator::grid_shape

namespace emulator {
inline Dim3 thread_index_of_fiber() { return {current, 0, 0}; }
}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }

template <class T, class V>
T atomicAdd(T* place, V value) {
  const T old = *place;
  *place = old + static_cast<T>(value);
  return old;
}

inline int32_t atomicCAS(int32_t* place, int32_t expected, int32_t value) {
  const int32_t old = *place;
  if (old == expected) *place = value;
  return old;
}
