// Launches of the CUDA kernels, one function an operator. Knows no torch: plain arguments in, a stream as a pointer.
#pragma once

#include "../indexing.h"

namespace ssd {

// Each returns null, or what is wrong with the launch.
const char* launch_copy_branch(const CopyArgs& args, const CopyPlan& plan, void* stream);
const char* launch_write_kv(const WriteArgs& args, void* stream);
const char* launch_rollback(const RollbackArgs& args, void* stream);
const char* launch_match_outcomes(const MatchArgs& args, void* stream);
const char* launch_sample_shared_noise(const SampleArgs& args, int64_t element_bytes, void* stream);

// What the kernels have reported since the last call on the current device, or null. Waits for the stream.
const char* take_fault(void* stream);

}  // namespace ssd
