// Grids and blocks of the CUDA kernels. Also compiled for the host with SSD_EMULATE, for the tests.
#include "launch.h"

#include "kernels.cuh"

namespace ssd {
namespace {

#ifdef SSD_EMULATE
int32_t threads_up_to(int32_t most) { return emulator::threads_up_to(most); }
const char* launch_error() { return nullptr; }
#else
int32_t threads_up_to(int32_t most) { return most; }
const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

constexpr int32_t kRowThreads = 128;

struct Grid {
  uint32_t x, y;
};

#ifndef SSD_EMULATE
dim3 shape(Grid grid) { return dim3(grid.x, grid.y); }
#else
emulator::Dim3 shape(Grid grid) { return {grid.x, grid.y, 1}; }
#endif

uint32_t blocks(int64_t count) { return static_cast<uint32_t>(count); }

template <class Unit>
void copy_units(const CopyArgs& args, const CopyPlan& plan, void* stream) {
  const auto kernel = copy_branch_kernel<Unit>;
  const Grid grid{blocks(plan.num_chunks), blocks(args.cache.num_planes)};
  const int64_t shared = args.num_rows * plan.chunk * static_cast<int64_t>(sizeof(Unit));
  SSD_LAUNCH(kernel, shape(grid), threads_up_to(kMaxThreads), shared, stream, args, plan);
}

template <class Unit>
void write_units(const WriteArgs& args, void* stream) {
  const auto kernel = write_kv_kernel<Unit>;
  const Grid grid{blocks(args.num_rows), 1};
  SSD_LAUNCH(kernel, shape(grid), threads_up_to(kRowThreads), 0, stream, args,
             static_cast<int64_t>(sizeof(Unit)) / args.element_bytes);
}

template <class From, class To>
void write_converted(const WriteArgs& args, void* stream) {
  const auto kernel = write_kv_convert_kernel<From, To>;
  const Grid grid{blocks(args.num_rows), 1};
  SSD_LAUNCH(kernel, shape(grid), threads_up_to(kRowThreads), 0, stream, args);
}

// Whether every piece of a row of one dtype can move in units of `unit` bytes.
bool fits(const WriteArgs& args, int64_t unit) {
  int64_t all = args.head_dim | args.half_stride | args.slot_stride | args.head_stride;
  for (int i = 0; i < 2; ++i) all |= args.key_strides[i] | args.value_strides[i];
  const auto address = reinterpret_cast<uintptr_t>(args.kv) | reinterpret_cast<uintptr_t>(args.key) |
                       reinterpret_cast<uintptr_t>(args.value);
  return (all * args.element_bytes) % unit == 0 && address % static_cast<uintptr_t>(unit) == 0;
}

}  // namespace

const char* launch_copy_branch(const CopyArgs& args, const CopyPlan& plan, void* stream) {
  if (plan.unit == 16) copy_units<Unit16>(args, plan, stream);
  if (plan.unit == 8) copy_units<uint64_t>(args, plan, stream);
  if (plan.unit == 4) copy_units<uint32_t>(args, plan, stream);
  if (plan.unit == 2) copy_units<uint16_t>(args, plan, stream);
  return launch_error();
}

const char* launch_write_kv(const WriteArgs& args, void* stream) {
  if (args.element_bytes == 4 && args.kv_element_bytes == 2) {
    write_converted<float, Bfloat16Bits>(args, stream);
  } else if (args.element_bytes == 2 && args.kv_element_bytes == 4) {
    write_converted<Bfloat16Bits, float>(args, stream);
  } else if (fits(args, 16)) {
    write_units<Unit16>(args, stream);
  } else if (args.element_bytes == 4) {
    write_units<uint32_t>(args, stream);
  } else {
    write_units<uint16_t>(args, stream);
  }
  return launch_error();
}

const char* launch_rollback(const RollbackArgs& args, void* stream) {
  const auto kernel = args.element_bytes == 2 ? rollback_kernel<Bfloat16Bits> : rollback_kernel<float>;
  const Grid grid{blocks(args.num_rows), 1};
  SSD_LAUNCH(kernel, shape(grid), threads_up_to(kMaxThreads), 0, stream, args);
  return launch_error();
}

const char* launch_match_outcomes(const MatchArgs& args, void* stream) {
  const int32_t threads = threads_up_to(kRowThreads);
  const Grid grid{blocks((args.num_rows + threads - 1) / threads), 1};
  SSD_LAUNCH(match_outcomes_kernel, shape(grid), threads, 0, stream, args);
  return launch_error();
}

const char* launch_sample_shared_noise(const SampleArgs& args, int64_t element_bytes, void* stream) {
  const auto kernel =
      element_bytes == 2 ? sample_shared_noise_kernel<Bfloat16Bits> : sample_shared_noise_kernel<float>;
  const Grid grid{blocks(args.num_rows), 1};
  SSD_LAUNCH(kernel, shape(grid), threads_up_to(kMaxThreads), 0, stream, args);
  return launch_error();
}

const char* take_fault(void* stream) {
  static const char* const kNames[] = {nullptr,
                                       "a source slot outside the pool",
                                       "a target slot outside the pool",
                                       "a slot outside the pool",
                                       "a sequence without a table",
                                       "a length out of range",
                                       "more rows kept than there are"};
#ifdef SSD_EMULATE
  (void)stream;
  const FaultRecord found = device_fault;
  device_fault = {0};
#else
  FaultRecord found{0};
  const FaultRecord none{0};
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemcpyFromSymbolAsync(&found, device_fault, sizeof(found), 0, cudaMemcpyDeviceToHost, on);
  if (error == cudaSuccess) error = cudaStreamSynchronize(on);
  if (error == cudaSuccess && found.fault != 0)
    error = cudaMemcpyToSymbolAsync(device_fault, &none, sizeof(none), 0, cudaMemcpyHostToDevice, on);
  if (error == cudaSuccess) error = cudaStreamSynchronize(on);
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return kNames[found.fault];
}

}  // namespace ssd
