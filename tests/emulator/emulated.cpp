// The CUDA kernels, their launches and their operators, compiled for the host as torch.ops.ssd_emulated.
#define SSD_EMULATE 1
#include "launcher.h"
// Then, in this order, what nvcc and the C++ compiler see apart.
#include "cuda/launch.cu"
#include "cuda/operators.cpp"

namespace {

void configure(int64_t threads, int64_t seed) {
  emulator::settings = {static_cast<int32_t>(threads), static_cast<uint64_t>(seed)};
}

}  // namespace

STABLE_TORCH_LIBRARY(ssd_emulated, m) {
  m.def("copy_branch_(Tensor(a!) kv, Tensor source_slots, Tensor target_slots) -> ()");
  m.def("write_kv_(Tensor(a!) kv, Tensor key, Tensor value, Tensor slots) -> ()");
  m.def(
      "rollback_(Tensor(a!) tables, Tensor(b!) lengths, Tensor sequences, Tensor kept, int block_size,"
      " Tensor(c!)? poison_kv=None) -> ()");
  m.def("match_outcomes(Tensor target_tokens, Tensor draft_tokens, Tensor lengths) -> (Tensor, Tensor)");
  m.def(
      "sample_shared_noise(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed,"
      " Tensor position, int count=1, int first_token=0) -> (Tensor, Tensor)");
  m.def("raise_faults(Tensor like) -> ()");
  m.def("configure(int threads, int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ssd_emulated, CompositeExplicitAutograd, m) { m.impl("configure", TORCH_BOX(&configure)); }
