// The operators on the cache and on tokens: schemas of all, CPU kernels. Their CUDA kernels are under cuda/.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "arguments.h"
#include "noise.h"
#include "sampling.h"

namespace {

using namespace ssd;

void check_slots(const int64_t* slots, int64_t count, int64_t num_slots, const char* op, const char* name) {
  for (int64_t row = 0; row < count; ++row) check_range(slots[row], 0, num_slots, op, name);
}

// Slots are scattered, so the hardware does not see the next row coming.
template <bool for_writing>
void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, for_writing ? 1 : 0);
}

// A copy past the caches, for more than they would keep: the old bytes of the target are not read to be overwritten.
void stream_row(char* target, const char* source, int64_t bytes) {
#if defined(__SSE2__)
  if (bytes % 16 == 0 && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
    for (int64_t i = 0; i < bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
    return;
  }
#endif
  std::memcpy(target, source, bytes);
}

// Streamed rows become visible to other threads in the order of what follows.
void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

bool are_disjoint(const CopyArgs& args) {
  std::vector<int64_t> sources(args.source, args.source + args.num_rows);
  std::sort(sources.begin(), sources.end());
  return std::none_of(args.target, args.target + args.num_rows,
                      [&](int64_t slot) { return std::binary_search(sources.begin(), sources.end(), slot); });
}

constexpr int64_t kStreamedBytes = int64_t{1} << 20;  // more than this does not stay in the L2 cache

void copy_branch_(const Tensor& kv, const Tensor& source_slots, const Tensor& target_slots) {
  const CopyArgs args = copy_args(kv, source_slots, target_slots);
  const CacheRows& cache = args.cache;
  check_slots(args.source, args.num_rows, cache.num_slots, "copy_branch_", "source slot");
  check_slots(args.target, args.num_rows, cache.num_slots, "copy_branch_", "target slot");
  if (args.num_rows == 0) return;
  const bool streams = cache.num_planes * args.num_rows * cache.row_bytes >= kStreamedBytes;
  const bool direct = streams && are_disjoint(args);
  parallel(cache.num_planes, 4, [&](int64_t begin, int64_t end) {
    const int64_t bytes = cache.row_bytes, ahead = std::max<int64_t>(2, 8192 / std::max<int64_t>(bytes, 1));
    // All of a plane before any row is written: overlap is safe.
    char* held = direct ? nullptr : thread_scratch(args.num_rows * bytes);
    for (int64_t plane = begin; plane < end; ++plane) {
      const auto at = [&](int64_t slot) { return cache.data + row_offset(cache, plane, slot); };
      for (int64_t row = 0; row < args.num_rows; ++row) {
        if (row + ahead < args.num_rows) prefetch_row<false>(at(args.source[row + ahead]), bytes);
        if (direct) {
          stream_row(at(args.target[row]), at(args.source[row]), bytes);
        } else {
          std::memcpy(held + row * bytes, at(args.source[row]), bytes);
        }
      }
      for (int64_t row = 0; row < args.num_rows && !direct; ++row) {
        if (streams) {
          stream_row(at(args.target[row]), held + row * bytes, bytes);
          continue;
        }
        if (row + ahead < args.num_rows) prefetch_row<true>(at(args.target[row + ahead]), bytes);
        std::memcpy(at(args.target[row]), held + row * bytes, bytes);
      }
    }
    if (streams) end_streaming();
  });
}

void write_kv_(const Tensor& kv, const Tensor& key, const Tensor& value, const Tensor& slots) {
  const WriteArgs args = write_args(kv, key, value, slots);
  check_slots(args.slots, args.num_rows, args.num_slots, "write_kv_", "slot");
  const auto dtype = [](int64_t bytes) { return bytes == 4 ? Dtype::kFloat32 : Dtype::kBfloat16; };
  RopeArgs rope{};  // a rotary write without a rotation
  rope.dtype = rope.angle_dtype = dtype(args.element_bytes);
  rope.kv_dtype = dtype(args.kv_element_bytes);
  rope.num_rows = args.num_rows;
  rope.num_kv_heads = args.num_heads;
  rope.head_dim = args.head_dim;
  rope.slots = args.slots;
  rope.k = const_cast<char*>(args.key);
  rope.v = args.value;
  for (int i = 0; i < 2; ++i) {
    rope.k_strides[i] = args.key_strides[i];
    rope.v_strides[i] = args.value_strides[i];
  }
  rope.kv = args.kv;
  rope.kv_strides[0] = args.half_stride;
  rope.kv_strides[1] = args.slot_stride;
  rope.kv_strides[2] = args.head_stride;
  kernels().rope_write(rope);
}

// The quiet NaN of the cache's dtype in every element of a row.
void poison_row(char* row, int64_t bytes, int64_t element_bytes) {
  const uint16_t half = 0x7FC0;
  const float whole = std::numeric_limits<float>::quiet_NaN();
  for (int64_t i = 0; i < bytes; i += element_bytes)
    std::memcpy(row + i, element_bytes == 2 ? static_cast<const void*>(&half) : &whole, element_bytes);
}

void rollback_(const Tensor& tables, const Tensor& lengths, const Tensor& sequences, const Tensor& kept,
               int64_t block_size, const std::optional<Tensor>& poison_kv) {
  const char* op = "rollback_";
  const RollbackArgs args = rollback_args(tables, lengths, sequences, kept, block_size, poison_kv);
  for (int64_t row = 0; row < args.num_rows; ++row) {  // all checks before the first change
    const int64_t sequence = args.sequences[row];
    check_range(sequence, -1, args.num_sequences, op, "sequence");
    if (sequence < 0) continue;
    const int64_t length = args.lengths[sequence];
    check_range(length, 0, args.num_columns + 1, op, "length");
    check_range(args.kept[row], 0, length + 1, op, "kept");
    if (args.cache.data != nullptr)
      check_slots(args.tables + sequence * args.table_stride + args.kept[row], length - args.kept[row],
                  args.cache.num_slots, op, "slot");
  }
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int64_t sequence = args.sequences[row];
    if (sequence < 0) continue;
    int64_t* table = args.tables + sequence * args.table_stride;
    if (args.cache.data != nullptr)
      for (int64_t plane = 0; plane < args.cache.num_planes; ++plane)
        for (int64_t column = args.kept[row]; column < args.lengths[sequence]; ++column)
          poison_row(args.cache.data + row_offset(args.cache, plane, table[column]), args.cache.row_bytes,
                     args.element_bytes);
    args.lengths[sequence] = args.kept[row];
    for (int64_t column = kept_columns(args.kept[row], block_size); column < args.num_columns; ++column)
      table[column] = -1;
  }
}

std::tuple<Tensor, Tensor> match_outcomes(const Tensor& target_tokens, const Tensor& draft_tokens,
                                          const Tensor& lengths) {
  MatchArgs args = match_args(target_tokens, draft_tokens, lengths);
  for (int64_t row = 0; row < args.num_rows; ++row)
    check_range(args.lengths[row], 0, args.lookahead + 1, "match_outcomes", "length");
  Tensor accepted = empty_cpu({args.num_rows}, ScalarType::Long), bonus = empty_cpu({args.num_rows}, ScalarType::Long);
  args.num_accepted = static_cast<int64_t*>(accepted.data_ptr());
  args.bonus = static_cast<int64_t*>(bonus.data_ptr());
  for (int64_t row = 0; row < args.num_rows; ++row) match_row(args, row, args.lengths[row]);
  return {accepted, bonus};
}

std::tuple<Tensor, Tensor> sample_shared_noise(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                               const Tensor& top_p, const Tensor& min_p, const Tensor& seed,
                                               const Tensor& position, int64_t count, int64_t first_token) {
  const SampleArgs args = sample_args(logits, temperature, top_k, top_p, min_p, seed, position, count, first_token);
  const Dtype dtype = float_dtype(View(logits), "sample_shared_noise", "logits");
  Tensor tokens = empty_cpu({args.num_rows, count}, ScalarType::Long);
  Tensor scores = empty_cpu({args.num_rows, count}, ScalarType::Double);
  auto* token = static_cast<int64_t*>(tokens.data_ptr());
  auto* score = static_cast<double*>(scores.data_ptr());
  std::fill(token, token + args.num_rows * count, int64_t{-1});
  std::fill(score, score + args.num_rows * count, -std::numeric_limits<double>::infinity());
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2, padded = (args.vocabulary + 15) / 16 * 16;
  parallel(args.num_rows, 1, [&](int64_t begin, int64_t end) {
    auto* z = reinterpret_cast<float*>(thread_scratch(padded * 8));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t key = noise_key(args.seeds[row], args.positions[row], args.first_token);
      const Draw draw{args.temperature[row], args.top_p[row], args.min_p[row], args.top_k[row], key};
      Ranking ranking{count, 0, score + row * count, token + row * count};
      rank_row(kernels(), static_cast<const char*>(args.logits) + row * args.logit_stride * size, dtype,
               args.vocabulary, draw, z, z + padded, ranking);
      for (int64_t place = 0; place < ranking.found; ++place) ranking.tokens[place] += args.first_token;
    }
  });
  return {tokens, scores};
}

// CPU kernels refuse wrong values before they start; only a device leaves faults behind.
void raise_faults(const Tensor&) {}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_runtime, m) {
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
}

STABLE_TORCH_LIBRARY_IMPL(ssd_runtime, CPU, m) {
  m.impl("copy_branch_", TORCH_BOX(&copy_branch_));
  m.impl("write_kv_", TORCH_BOX(&write_kv_));
  m.impl("rollback_", TORCH_BOX(&rollback_));
  m.impl("match_outcomes", TORCH_BOX(&match_outcomes));
  m.impl("sample_shared_noise", TORCH_BOX(&sample_shared_noise));
  m.impl("raise_faults", TORCH_BOX(&raise_faults));
}
