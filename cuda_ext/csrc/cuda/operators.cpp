// The CUDA side of the cache and token operators: tensors in, launches on the current stream. Schemas and CPU kernels
// are in ../cache_operators.cpp. Host code only, so a plain C++ compiler builds it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../arguments.h"
#include "launch.h"

#ifndef SSD_EMULATE
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace {

using namespace ssd;

// The device of a tensor, current for as long as this lives, and its current stream.
class OnDevice {
 public:
#ifdef SSD_EMULATE
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
#endif
  void* stream = nullptr;

 private:
#ifndef SSD_EMULATE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

constexpr int64_t kMaxBlocks = 0x7FFFFFFF, kMaxPlanes = 65535;

void check_launch(const char* error, const char* op) {
  SSD_CHECK(error == nullptr, op, ": ", error == nullptr ? "" : error);
}

void check_blocks(int64_t count, const char* op) {
  SSD_CHECK(count <= kMaxBlocks, op, ": at most ", kMaxBlocks, " rows in one call, not ", count);
}

void copy_branch_(const Tensor& kv, const Tensor& source_slots, const Tensor& target_slots) {
  const char* op = "copy_branch_";
  const CopyArgs args = copy_args(kv, source_slots, target_slots);
  const int64_t size = element_bytes(View(kv), op, "kv");
  if (args.num_rows == 0 || args.cache.num_planes == 0 || args.cache.row_bytes == 0) return;
  const CopyPlan plan = plan_copy(args, size);
  SSD_CHECK(plan.unit != 0, op, ": at most ", kCopySharedBytes / size, " rows in one call, not ", args.num_rows);
  SSD_CHECK(args.cache.num_planes <= kMaxPlanes, op, ": too many layers");
  const OnDevice device(kv);
  check_launch(launch_copy_branch(args, plan, device.stream), op);
}

void write_kv_(const Tensor& kv, const Tensor& key, const Tensor& value, const Tensor& slots) {
  const WriteArgs args = write_args(kv, key, value, slots);
  check_blocks(args.num_rows, "write_kv_");
  if (args.num_rows == 0 || args.num_heads * args.head_dim == 0) return;
  const OnDevice device(kv);
  check_launch(launch_write_kv(args, device.stream), "write_kv_");
}

void rollback_(const Tensor& tables, const Tensor& lengths, const Tensor& sequences, const Tensor& kept,
               int64_t block_size, const std::optional<Tensor>& poison_kv) {
  const RollbackArgs args = rollback_args(tables, lengths, sequences, kept, block_size, poison_kv);
  check_blocks(args.num_rows, "rollback_");
  if (args.num_rows == 0) return;
  const OnDevice device(tables);
  check_launch(launch_rollback(args, device.stream), "rollback_");
}

std::tuple<Tensor, Tensor> match_outcomes(const Tensor& target_tokens, const Tensor& draft_tokens,
                                          const Tensor& lengths) {
  MatchArgs args = match_args(target_tokens, draft_tokens, lengths);
  check_blocks(args.num_rows, "match_outcomes");
  const OnDevice device(target_tokens);
  Tensor accepted = empty_beside(target_tokens, {args.num_rows}, ScalarType::Long);
  Tensor bonus = empty_beside(target_tokens, {args.num_rows}, ScalarType::Long);
  args.num_accepted = static_cast<int64_t*>(accepted.data_ptr());
  args.bonus = static_cast<int64_t*>(bonus.data_ptr());
  if (args.num_rows > 0) check_launch(launch_match_outcomes(args, device.stream), "match_outcomes");
  return {accepted, bonus};
}

std::tuple<Tensor, Tensor> sample_shared_noise(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                               const Tensor& top_p, const Tensor& min_p, const Tensor& seed,
                                               const Tensor& position, int64_t count, int64_t first_token) {
  const char* op = "sample_shared_noise";
  SampleArgs args = sample_args(logits, temperature, top_k, top_p, min_p, seed, position, count, first_token);
  check_blocks(args.num_rows, op);
  const OnDevice device(logits);
  Tensor tokens = empty_beside(logits, {args.num_rows, count}, ScalarType::Long);
  Tensor scores = empty_beside(logits, {args.num_rows, count}, ScalarType::Double);
  args.tokens = static_cast<int64_t*>(tokens.data_ptr());
  args.scores = static_cast<double*>(scores.data_ptr());
  const int64_t size = element_bytes(View(logits), op, "logits");
  if (args.num_rows > 0) check_launch(launch_sample_shared_noise(args, size, device.stream), op);
  return {tokens, scores};
}

// Waits for the stream; not for use under graph capture.
void raise_faults(const Tensor& like) {
  const OnDevice device(like);
  const char* fault = take_fault(device.stream);
  SSD_CHECK(fault == nullptr, "a kernel has met ", fault == nullptr ? "" : fault,
            " and left that row alone: the KV cache of this process cannot be trusted any more. Restart it;"
            " SSD_CUDA_EXT=0 makes it use plain torch");
}

}  // namespace

#ifdef SSD_EMULATE
#define SSD_LIBRARY ssd_emulated
#define SSD_KEY CPU
#else
#define SSD_LIBRARY ssd_runtime
#define SSD_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(SSD_LIBRARY, SSD_KEY, m) {
  m.impl("copy_branch_", TORCH_BOX(&copy_branch_));
  m.impl("write_kv_", TORCH_BOX(&write_kv_));
  m.impl("rollback_", TORCH_BOX(&rollback_));
  m.impl("match_outcomes", TORCH_BOX(&match_outcomes));
  m.impl("sample_shared_noise", TORCH_BOX(&sample_shared_noise));
  m.impl("raise_faults", TORCH_BOX(&raise_faults));
}
