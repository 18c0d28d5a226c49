// What the operators on CPU tensors share: views of stable tensors, checks with readable errors, memory, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "kernels.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // as it is called since torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace ssd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define SSD_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

// What the checks and kernels need of a tensor, fetched once.
struct View {
  char* data;
  const int64_t *sizes, *strides;
  int64_t dim;
  ScalarType type;

  explicit View(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        sizes(tensor.sizes().data()),
        strides(tensor.strides().data()),
        dim(tensor.dim()),
        type(tensor.scalar_type()) {}

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
    return count;
  }
  // Whether the last dimension is dense (or too short to matter).
  bool dense_rows() const { return sizes[dim - 1] <= 1 || strides[dim - 1] == 1; }
};

inline Dtype float_dtype(const View& view, const char* op, const char* name) {
  SSD_CHECK(view.type == ScalarType::Float || view.type == ScalarType::BFloat16, op, ": ", name,
            " must be float32 or bfloat16");
  return view.type == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBfloat16;
}

inline void check_dim(const View& view, int64_t dim, const char* op, const char* name) {
  SSD_CHECK(view.dim == dim, op, ": ", name, " must have ", dim, " dimensions, not ", view.dim);
  SSD_CHECK(view.dense_rows(), op, ": the last dimension of ", name, " must be contiguous");
}

inline void check_size(int64_t size, int64_t expected, const char* op, const char* name) {
  SSD_CHECK(size == expected, op, ": ", name, " must be ", expected, ", not ", size);
}

inline void check_int64(const View& view, int64_t dim, const char* op, const char* name) {
  SSD_CHECK(view.type == ScalarType::Long, op, ": ", name, " must be int64");
  check_dim(view, dim, op, name);
}

inline void check_range(int64_t value, int64_t low, int64_t high, const char* op, const char* name) {
  SSD_CHECK(low <= value && value < high, op, ": ", name, " ", value, " is outside [", low, ", ", high, ")");
}

inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4] = {1, 1, 1, 1};
  const int64_t* size = sizes.begin();
  const auto dim = static_cast<int64_t>(sizes.size());
  for (int64_t d = dim - 2; d >= 0; --d) strides[d] = strides[d + 1] * size[d + 1];
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, size, strides, static_cast<int32_t>(type),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void check_kv(const View& kv, int64_t head_dim, const char* op) {
  check_dim(kv, 4, op, "kv");
  check_size(kv.sizes[0], 2, op, "the first dimension of kv");
  check_size(kv.sizes[3], head_dim, op, "the head dimension of kv");
}

template <class Run>
void parallel(int64_t count, int64_t grain, const Run& run) {
  if (count <= grain || torch::stable::get_num_threads() <= 1) return run(0, count);
  torch::stable::parallel_for(0, count, grain, run);
}

// Fills in which slots each row sees, and checks every one of them: the kernels trust what they are given.
inline void set_visible(AttentionArgs& args, const Tensor& sequence, const Tensor& tables, const Tensor& prefix,
                        const Tensor& chain, int64_t num_slots, const char* op) {
  const View sv(sequence), tv(tables), pv(prefix), cv(chain);
  check_int64(sv, 1, op, "sequence");
  check_int64(tv, 2, op, "tables");
  check_int64(pv, 1, op, "prefix");
  check_int64(cv, 2, op, "chain");
  check_size(sv.sizes[0], args.num_rows, op, "the length of sequence");
  check_size(pv.sizes[0], args.num_rows, op, "the length of prefix");
  check_size(cv.sizes[0], args.num_rows, op, "the number of rows of chain");
  args.sequence = reinterpret_cast<const int64_t*>(sv.data);
  args.tables = reinterpret_cast<const int64_t*>(tv.data);
  args.prefix = reinterpret_cast<const int64_t*>(pv.data);
  args.chain = reinterpret_cast<const int64_t*>(cv.data);
  args.table_stride = tv.strides[0];
  args.chain_stride = cv.strides[0];
  args.chain_width = cv.sizes[1];
  int64_t checked_sequence = -1, checked = 0;
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int64_t s = args.sequence[row];
    check_range(s, 0, tv.sizes[0], op, "sequence");
    check_range(args.prefix[row], 0, tv.sizes[1] + 1, op, "prefix");
    if (s != checked_sequence) checked_sequence = s, checked = 0;
    for (; checked < args.prefix[row]; ++checked)
      check_range(args.tables[s * args.table_stride + checked], 0, num_slots, op, "slot");
    for (int64_t c = 0; c < args.chain_width; ++c)
      check_range(args.chain[row * args.chain_stride + c], INT64_MIN, num_slots, op, "chain slot");
  }
}

// The kernels over torch's threads.
inline void run_linear(const LinearArgs& args) {
  if (args.num_rows == 0 || args.out_features == 0) return;
  const Kernels& level = kernels();
  char* scratch = thread_scratch(level.linear_scratch(args));
  level.linear_prepare(args, scratch);
  parallel(num_panels(args.out_features), 4,
           [&](int64_t begin, int64_t end) { level.linear_panels(args, scratch, begin, end); });
}

inline void run_attention(const AttentionArgs& args) {
  if (args.num_rows == 0) return;
  parallel(args.num_kv_heads, 1, [&](int64_t begin, int64_t end) { kernels().paged_attention(args, begin, end); });
}

}  // namespace ssd
