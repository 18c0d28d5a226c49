// From tensors to the arguments of the cache and token operators, with every check that needs no value of a tensor.
#pragma once

#include <initializer_list>
#include <optional>
#include <utility>

#include "indexing.h"
#include "tensors.h"

namespace ssd {

using Named = std::pair<const Tensor*, const char*>;

inline int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

inline void check_device(const Tensor& first, std::initializer_list<Named> others, const char* op) {
  for (const auto& [other, name] : others)
    SSD_CHECK(device_type(*other) == device_type(first) && other->get_device_index() == first.get_device_index(), op,
              ": ", name, " must be on the device of the first argument");
}

inline Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4] = {1, 1, 1, 1};
  const int64_t* size = sizes.begin();
  const auto dim = static_cast<int64_t>(sizes.size());
  for (int64_t d = dim - 2; d >= 0; --d) strides[d] = strides[d + 1] * size[d + 1];
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, size, strides, static_cast<int32_t>(type),
                                                         device_type(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline int64_t* int64s(const View& view) { return reinterpret_cast<int64_t*>(view.data); }

inline int64_t element_bytes(const View& view, const char* op, const char* name) {
  return float_dtype(view, op, name) == Dtype::kFloat32 ? 4 : 2;
}

inline CacheRows cache_rows(const View& kv, const char* op) {
  check_dim(kv, 5, op, "kv");
  const int64_t size = element_bytes(kv, op, "kv");
  check_size(kv.sizes[1], 2, op, "the second dimension of kv");
  SSD_CHECK(kv.strides[3] == kv.sizes[4] || kv.sizes[3] <= 1, op, ": the heads of a slot must be contiguous");
  return {kv.data,
          kv.sizes[0] * kv.sizes[1],
          kv.sizes[2],
          kv.sizes[3] * kv.sizes[4] * size,
          kv.strides[0] * size,
          kv.strides[1] * size,
          kv.strides[2] * size};
}

inline CopyArgs copy_args(const Tensor& kv, const Tensor& source_slots, const Tensor& target_slots) {
  const char* op = "copy_branch_";
  check_device(kv, {{&source_slots, "source_slots"}, {&target_slots, "target_slots"}}, op);
  const View source(source_slots), target(target_slots);
  CopyArgs args{cache_rows(View(kv), op), 0, int64s(source), int64s(target)};
  check_int64(source, 1, op, "source_slots");
  check_int64(target, 1, op, "target_slots");
  args.num_rows = source.sizes[0];
  check_size(target.sizes[0], args.num_rows, op, "the number of target slots");
  return args;
}

inline WriteArgs write_args(const Tensor& kv, const Tensor& key, const Tensor& value, const Tensor& slots) {
  const char* op = "write_kv_";
  check_device(kv, {{&key, "key"}, {&value, "value"}, {&slots, "slots"}}, op);
  const View cache(kv), k(key), v(value), slot(slots);
  check_dim(k, 3, op, "key");
  check_dim(v, 3, op, "value");
  check_int64(slot, 1, op, "slots");
  check_kv(cache, k.sizes[2], op);
  SSD_CHECK(k.type == v.type, op, ": key and value must have one dtype");
  for (int d = 0; d < 3; ++d) check_size(v.sizes[d], k.sizes[d], op, "a dimension of value");
  check_size(cache.sizes[2], k.sizes[1], op, "the number of heads of kv");
  check_size(slot.sizes[0], k.sizes[0], op, "the number of slots");
  WriteArgs args{};
  args.kv = cache.data;
  args.key = k.data;
  args.value = v.data;
  args.num_rows = k.sizes[0];
  args.num_heads = k.sizes[1];
  args.head_dim = k.sizes[2];
  args.num_slots = cache.sizes[1];
  args.element_bytes = element_bytes(k, op, "key");
  args.kv_element_bytes = element_bytes(cache, op, "kv");
  args.half_stride = cache.strides[0];
  args.slot_stride = cache.strides[1];
  args.head_stride = cache.strides[2];
  for (int i = 0; i < 2; ++i) {
    args.key_strides[i] = k.strides[i];
    args.value_strides[i] = v.strides[i];
  }
  args.slots = int64s(slot);
  return args;
}

inline RollbackArgs rollback_args(const Tensor& tables, const Tensor& lengths, const Tensor& sequences,
                                  const Tensor& kept, int64_t block_size, const std::optional<Tensor>& poison_kv) {
  const char* op = "rollback_";
  check_device(tables, {{&lengths, "lengths"}, {&sequences, "sequences"}, {&kept, "kept"}}, op);
  const View table(tables), length(lengths), sequence(sequences), keep(kept);
  check_int64(table, 2, op, "tables");
  check_int64(length, 1, op, "lengths");
  check_int64(sequence, 1, op, "sequences");
  check_int64(keep, 1, op, "kept");
  check_size(length.sizes[0], table.sizes[0], op, "the number of lengths");
  check_size(keep.sizes[0], sequence.sizes[0], op, "the length of kept");
  SSD_CHECK(block_size >= 1, op, ": block_size must be at least 1, not ", block_size);
  RollbackArgs args{};
  args.block_size = block_size;
  args.num_rows = sequence.sizes[0];
  args.num_sequences = table.sizes[0];
  args.num_columns = table.sizes[1];
  args.table_stride = table.strides[0];
  args.tables = int64s(table);
  args.lengths = int64s(length);
  args.sequences = int64s(sequence);
  args.kept = int64s(keep);
  if (poison_kv.has_value()) {
    check_device(tables, {{&*poison_kv, "poison_kv"}}, op);
    const View cache(*poison_kv);
    args.cache = cache_rows(cache, op);
    args.element_bytes = element_bytes(cache, op, "kv");
  }
  return args;
}

// Outputs are left for the caller to set.
inline MatchArgs match_args(const Tensor& target_tokens, const Tensor& draft_tokens, const Tensor& lengths) {
  const char* op = "match_outcomes";
  check_device(target_tokens, {{&draft_tokens, "draft_tokens"}, {&lengths, "lengths"}}, op);
  const View target(target_tokens), draft(draft_tokens), length(lengths);
  check_int64(target, 2, op, "target_tokens");
  check_int64(draft, 2, op, "draft_tokens");
  check_int64(length, 1, op, "lengths");
  const int64_t rows = target.sizes[0];
  check_size(draft.sizes[0], rows, op, "the number of rows of draft_tokens");
  check_size(length.sizes[0], rows, op, "the number of lengths");
  check_size(target.sizes[1], draft.sizes[1] + 1, op, "the number of columns of target_tokens");
  return {rows,           draft.sizes[1], target.strides[0], draft.strides[0], int64s(target), int64s(draft),
          int64s(length), nullptr,        nullptr};
}

inline const double* doubles(const Tensor& tensor, int64_t rows, const char* op, const char* name) {
  const View view(tensor);
  SSD_CHECK(view.type == ScalarType::Double, op, ": ", name, " must be float64");
  check_dim(view, 1, op, name);
  check_size(view.sizes[0], rows, op, "the length of temperature, top_p and min_p");
  return reinterpret_cast<const double*>(view.data);
}

inline SampleArgs sample_args(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                              const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& position,
                              int64_t count, int64_t first_token) {
  const char* op = "sample_shared_noise";
  check_device(logits,
               {{&temperature, "temperature"},
                {&top_k, "top_k"},
                {&top_p, "top_p"},
                {&min_p, "min_p"},
                {&seed, "seed"},
                {&position, "position"}},
               op);
  const View view(logits), k(top_k), seeds(seed), positions(position);
  float_dtype(view, op, "logits");
  check_dim(view, 2, op, "logits");
  check_int64(k, 1, op, "top_k");
  check_int64(seeds, 1, op, "seed");
  check_int64(positions, 1, op, "position");
  SSD_CHECK(count >= 1, op, ": count must be at least 1, not ", count);
  const int64_t rows = view.sizes[0];
  check_size(k.sizes[0], rows, op, "the length of top_k");
  check_size(seeds.sizes[0], rows, op, "the length of seed");
  check_size(positions.sizes[0], rows, op, "the length of position");
  SampleArgs args{};
  args.num_rows = rows;
  args.vocabulary = view.sizes[1];
  args.count = count;
  args.first_token = first_token;
  args.logit_stride = view.strides[0];
  args.logits = view.data;
  args.temperature = doubles(temperature, rows, op, "temperature");
  args.top_p = doubles(top_p, rows, op, "top_p");
  args.min_p = doubles(min_p, rows, op, "min_p");
  args.top_k = int64s(k);
  args.seeds = int64s(seeds);
  args.positions = int64s(positions);
  return args;
}

}  // namespace ssd
