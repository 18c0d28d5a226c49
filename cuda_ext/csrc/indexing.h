// Where things are: the arguments of the cache and token operators and their index arithmetic, for CPU and CUDA alike.
//
// Knows no torch and no launch. Strides are in bytes where the member says bytes, else in elements.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SSD_HD __host__ __device__ inline
#else
#define SSD_HD inline
#endif

namespace ssd {

SSD_HD bool in_range(int64_t value, int64_t size) { return value >= 0 && value < size; }

// The rows of a cache kv[layer, 2, slot, head, dim]. A plane is one layer's keys or values; a row is contiguous.
struct CacheRows {
  char* data;
  int64_t num_planes, num_slots, row_bytes, layer_bytes, half_bytes, slot_bytes;
};

SSD_HD int64_t row_offset(const CacheRows& cache, int64_t plane, int64_t slot) {
  return plane / 2 * cache.layer_bytes + plane % 2 * cache.half_bytes + slot * cache.slot_bytes;
}

struct CopyArgs {
  CacheRows cache;
  int64_t num_rows;
  const int64_t *source, *target;
};

// How the CUDA kernel cuts a copy: a block owns `chunk` units of `unit` bytes of every row of one plane and holds them
// all in shared memory before it writes one, so that source and target may overlap. unit = 0: too many rows.
struct CopyPlan {
  int32_t unit, chunk, units_per_row, num_chunks;
};

constexpr int64_t kCopySharedBytes = 48 * 1024, kCopyTargetBytes = 16 * 1024, kSectorBytes = 32;

SSD_HD CopyPlan plan_copy(const CopyArgs& args, int64_t element_bytes) {
  const CacheRows& cache = args.cache;
  const int64_t all = cache.row_bytes | cache.layer_bytes | cache.half_bytes | cache.slot_bytes |
                      static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.data) & 15);
  for (int64_t unit = 16; unit >= element_bytes; unit /= 2) {
    if (all % unit != 0 || args.num_rows * unit > kCopySharedBytes) continue;
    const int64_t units = cache.row_bytes / unit, least = kSectorBytes / unit, most = kCopySharedBytes / unit;
    int64_t chunk = kCopyTargetBytes / (args.num_rows * unit);
    if (chunk < least) chunk = least;
    if (chunk > most / args.num_rows) chunk = most / args.num_rows;
    if (chunk > units) chunk = units;
    return {static_cast<int32_t>(unit), static_cast<int32_t>(chunk), static_cast<int32_t>(units),
            static_cast<int32_t>((units + chunk - 1) / chunk)};
  }
  return {0, 0, 0, 0};
}

struct WriteArgs {
  char* kv;
  const char *key, *value;
  int64_t num_rows, num_heads, head_dim, num_slots, element_bytes, kv_element_bytes;
  int64_t half_stride, slot_stride, head_stride;  // of kv
  int64_t key_strides[2], value_strides[2];       // row, head
  const int64_t* slots;
};

// One piece of a fresh row: which half (0 key, 1 value), head and first feature, counted in pieces of `width` features.
struct WritePlace {
  int64_t source, target;  // in elements
  bool is_value;
};

SSD_HD WritePlace write_place(const WriteArgs& args, int64_t row, int64_t slot, int64_t piece, int64_t width) {
  const int64_t per_head = args.head_dim / width, feature = piece % per_head * width;
  const int64_t head = piece / per_head % args.num_heads;
  const bool is_value = piece / per_head >= args.num_heads;
  const int64_t* strides = is_value ? args.value_strides : args.key_strides;
  return {row * strides[0] + head * strides[1] + feature,
          (is_value ? args.half_stride : 0) + slot * args.slot_stride + head * args.head_stride + feature, is_value};
}

struct RollbackArgs {
  CacheRows cache;  // data is null where nothing is poisoned
  int64_t element_bytes, block_size, num_rows, num_sequences, num_columns, table_stride;
  int64_t *tables, *lengths;
  const int64_t *sequences, *kept;
};

// Columns of a table that stay valid when `kept` rows stay: whole blocks.
SSD_HD int64_t kept_columns(int64_t kept, int64_t block_size) {
  return (kept + block_size - 1) / block_size * block_size;
}

struct MatchArgs {
  int64_t num_rows, lookahead, target_stride, draft_stride;
  const int64_t *target, *draft, *lengths;
  int64_t *num_accepted, *bonus;
};

SSD_HD void match_row(const MatchArgs& args, int64_t row, int64_t length) {
  const int64_t* own = args.target + row * args.target_stride;
  const int64_t* guessed = args.draft + row * args.draft_stride;
  int64_t matched = 0;
  while (matched < length && own[matched] == guessed[matched]) ++matched;
  args.num_accepted[row] = matched;
  args.bonus[row] = own[matched];
}

struct SampleArgs {
  int64_t num_rows, vocabulary, count, logit_stride, first_token;
  const void* logits;
  const double *temperature, *top_p, *min_p;
  const int64_t *top_k, *seeds, *positions;
  int64_t* tokens;
  double* scores;
};

}  // namespace ssd
