// Picks the level of CPU kernels once, at first use.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ssd {
namespace {

struct Level {
  const char* name;
  bool runs_here;
  const Kernels& (*kernels)();
};

// Throws for a level that is none, or that this CPU does not run: another one would be slow, or crash, in silence.
const Kernels& pick() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  const Level levels[] = {{"avx512", avx512, avx512_kernels}, {"avx2", avx2, avx2_kernels},
                          {"baseline", true, baseline_kernels}};
#else
  const Level levels[] = {{"baseline", true, baseline_kernels}};
#endif
  const char* wanted = std::getenv("SSD_CPU_LEVEL");
  const bool any = wanted == nullptr || *wanted == 0;
  std::string here;
  for (const Level& level : levels) {
    if (level.runs_here && (any || std::strcmp(wanted, level.name) == 0)) return level.kernels();
    if (level.runs_here) here += std::string(here.empty() ? "" : ", ") + level.name;
  }
  throw std::runtime_error("SSD_CPU_LEVEL=" + std::string(wanted) + " is no level of kernels that this CPU runs: " + here +
                           "; use one of these, or unset it");
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
