// Picks the level of CPU kernels once, at first use.
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

namespace ssd {
namespace {

const Kernels& pick() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("SSD_CPU_LEVEL");
  const bool any = wanted == nullptr || *wanted == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (avx512 && (any || std::strcmp(wanted, "avx512") == 0)) return avx512_kernels();
  if (avx2 && (any || std::strcmp(wanted, "avx2") == 0)) return avx2_kernels();
#endif
  return baseline_kernels();
}

struct Scratch {
  char* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

char* thread_scratch(int64_t bytes) {
  thread_local Scratch scratch;
  if (bytes > scratch.size) {
    std::free(scratch.data);
    scratch.data = nullptr;
    scratch.size = (bytes + 4095) / 4096 * 4096;
    scratch.data = static_cast<char*>(std::aligned_alloc(64, scratch.size));
    if (scratch.data == nullptr) {
      scratch.size = 0;
      throw std::bad_alloc();
    }
  }
  return scratch.data;
}

const Kernels& kernels() {
  static const Kernels& picked = pick();
  return picked;
}

}  // namespace ssd
