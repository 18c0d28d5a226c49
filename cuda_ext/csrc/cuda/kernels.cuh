// The CUDA kernels of the cache and token operators. Index arithmetic is in ../indexing.h, launches in launch.cu.
//
// A kernel never follows a slot, length or sequence outside its range: it leaves that row alone and reports a fault,
// which raise_faults() reads later. So a launch needs no look at the values from the host, and a CUDA graph can hold it.
#pragma once

#include "../indexing.h"
#include "../noise.h"
#include "device.h"

namespace ssd {

enum class Fault : int32_t { kNone, kSourceSlot, kTargetSlot, kSlot, kSequence, kLength, kKept };

struct FaultRecord {
  int32_t fault;
};
SSD_DEVICE_GLOBAL FaultRecord device_fault;

// The first one stays.
SSD_DEVICE void report(Fault fault) { atomicCAS(&device_fault.fault, 0, static_cast<int32_t>(fault)); }

struct alignas(16) Unit16 {
  uint64_t low, high;
};

constexpr int32_t kMaxThreads = 256;

// ---- copy_branch_: grid (chunks, planes)

template <class Unit>
SSD_KERNEL SSD_BOUNDS(kMaxThreads) copy_branch_kernel(CopyArgs args, CopyPlan plan) {
  SSD_DYNAMIC_SHARED(Unit, held);
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * plan.chunk, rest = plan.units_per_row - begin;
  const int32_t width = rest < plan.chunk ? rest : plan.chunk;
  const int32_t total = static_cast<int32_t>(args.num_rows) * width;
  for (int32_t i = threadIdx.x; i < total; i += blockDim.x) {
    const int64_t slot = args.source[i / width];
    if (in_range(slot, args.cache.num_slots)) {
      held[i] = reinterpret_cast<const Unit*>(args.cache.data + row_offset(args.cache, blockIdx.y, slot))[begin + i % width];
    } else {
      report(Fault::kSourceSlot);
    }
  }
  __syncthreads();  // every row is held before one is written
  for (int32_t i = threadIdx.x; i < total; i += blockDim.x) {
    const int64_t slot = args.target[i / width];
    if (!in_range(slot, args.cache.num_slots)) {
      report(Fault::kTargetSlot);
    } else if (in_range(args.source[i / width], args.cache.num_slots)) {
      reinterpret_cast<Unit*>(args.cache.data + row_offset(args.cache, blockIdx.y, slot))[begin + i % width] = held[i];
    }
  }
}

// ---- write_kv_: grid (rows)

// One dtype: moves units of `width` elements.
template <class Unit>
SSD_KERNEL SSD_BOUNDS(kMaxThreads) write_kv_kernel(WriteArgs args, int64_t width) {
  const int64_t slot = args.slots[blockIdx.x];
  if (!in_range(slot, args.num_slots)) return report(Fault::kSlot);
  const int64_t pieces = 2 * args.num_heads * (args.head_dim / width);
  for (int64_t piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
    const WritePlace place = write_place(args, blockIdx.x, slot, piece, width);
    const char* source = (place.is_value ? args.value : args.key) + place.source * args.element_bytes;
    *reinterpret_cast<Unit*>(args.kv + place.target * args.element_bytes) = *reinterpret_cast<const Unit*>(source);
  }
}

template <class From, class To>
SSD_KERNEL SSD_BOUNDS(kMaxThreads) write_kv_convert_kernel(WriteArgs args) {
  const int64_t slot = args.slots[blockIdx.x];
  if (!in_range(slot, args.num_slots)) return report(Fault::kSlot);
  const int64_t pieces = 2 * args.num_heads * args.head_dim;
  for (int64_t piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
    const WritePlace place = write_place(args, blockIdx.x, slot, piece, 1);
    const From value = reinterpret_cast<const From*>(place.is_value ? args.value : args.key)[place.source];
    from_float(to_float(value), reinterpret_cast<To*>(args.kv)[place.target]);
  }
}

// ---- rollback_: grid (rows)

template <class Element>
SSD_KERNEL SSD_BOUNDS(kMaxThreads) rollback_kernel(RollbackArgs args) {
  const int64_t sequence = args.sequences[blockIdx.x], kept = args.kept[blockIdx.x];
  if (sequence == -1) return;  // pads the batch
  if (!in_range(sequence, args.num_sequences)) return report(Fault::kSequence);
  int64_t* table = args.tables + sequence * args.table_stride;
  const int64_t length = args.lengths[sequence];
  if (!in_range(length, args.num_columns + 1)) return report(Fault::kLength);
  if (!in_range(kept, length + 1)) return report(Fault::kKept);
  if (args.cache.data != nullptr) {
    const int64_t dropped = length - kept, elements = args.cache.row_bytes / static_cast<int64_t>(sizeof(Element));
    const int64_t per_plane = dropped * elements, total = per_plane * args.cache.num_planes;
    Element nan;
    from_float(float_of(0x7FC00000u), nan);
    for (int64_t i = threadIdx.x; i < total; i += blockDim.x) {
      const int64_t slot = table[kept + i % per_plane / elements];
      if (in_range(slot, args.cache.num_slots)) {
        reinterpret_cast<Element*>(args.cache.data + row_offset(args.cache, i / per_plane, slot))[i % elements] = nan;
      } else {
        report(Fault::kSlot);
      }
    }
  }
  __syncthreads();  // nobody reads the old table or length any more
  if (threadIdx.x == 0) args.lengths[sequence] = kept;
  for (int64_t column = kept_columns(kept, args.block_size) + threadIdx.x; column < args.num_columns;
       column += blockDim.x)
    table[column] = -1;
}

// ---- match_outcomes: a thread a row

SSD_KERNEL SSD_BOUNDS(kMaxThreads) match_outcomes_kernel(MatchArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= args.num_rows) return;
  const int64_t length = args.lengths[row];
  if (!in_range(length, args.lookahead + 1)) report(Fault::kLength);
  match_row(args, row, in_range(length, args.lookahead + 1) ? length : 0);
}

// ---- sample_shared_noise: grid (rows)

constexpr int32_t kBins = 256, kGroup = 16;

struct SampleShared {
  double scores[kMaxThreads];
  int64_t tokens[kMaxThreads];
  unsigned long long bins[kBins], groups[kBins / kGroup];
  unsigned long long left;  // weight still to collect
  uint32_t prefix;          // the digits found so far
};

template <class Element>
struct SampleRow {
  const Element* logits;
  int64_t vocabulary, key;
  float temperature;  // 0: greedy

  SSD_HD float z(int64_t token) const {
    const float logit = to_float(logits[token]);
#ifdef __CUDA_ARCH__
    return temperature == 0.0f ? logit : __fdiv_rn(logit, temperature);
#else
    return temperature == 0.0f ? logit : logit / temperature;
#endif
  }
};

// Ties go to the lower token.
SSD_DEVICE bool is_before(double score, int64_t token, double other_score, int64_t other_token) {
  return score > other_score || (score == other_score && token < other_token);
}

// Leaves the best (score, token) over all threads in shared.scores[0] and tokens[0].
SSD_DEVICE void reduce_best(SampleShared& shared, double score, int64_t token) {
  shared.scores[threadIdx.x] = score;
  shared.tokens[threadIdx.x] = token;
  for (uint32_t half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    const uint32_t other = threadIdx.x + half;
    if (threadIdx.x < half && is_before(shared.scores[other], shared.tokens[other], shared.scores[threadIdx.x],
                                        shared.tokens[threadIdx.x])) {
      shared.scores[threadIdx.x] = shared.scores[other];
      shared.tokens[threadIdx.x] = shared.tokens[other];
    }
  }
  __syncthreads();
}

// Probability relative to the best, in fixed point: integers add up to the same sum in any order.
SSD_DEVICE unsigned long long mass(float z, float most) {
  return static_cast<unsigned long long>(exp(static_cast<double>(z) - most) * 0x1p44 + 0.5);
}

// The largest value v such that the tokens with z >= v weigh at least `wanted`, among z >= floor; by radix, eight bits
// at a time from the top. A token weighs 1, or its mass where `by_mass` holds.
template <class Element>
SSD_DEVICE float weighted_floor(const SampleRow<Element>& row, SampleShared& shared, float floor, bool by_mass,
                                float most, unsigned long long wanted) {
  if (threadIdx.x == 0) {
    shared.left = wanted;
    shared.prefix = 0;
  }
  for (int32_t shift = 24; shift >= 0; shift -= 8) {
    for (int32_t bin = threadIdx.x; bin < kBins; bin += blockDim.x) shared.bins[bin] = 0;
    __syncthreads();
    const uint32_t prefix = shared.prefix;
    for (int64_t token = threadIdx.x; token < row.vocabulary; token += blockDim.x) {
      const float z = row.z(token);
      const uint32_t ordered = ordered_bits(z);
      if (!(z >= floor) || (shift < 24 && (ordered >> (shift + 8)) != prefix)) continue;
      atomicAdd(&shared.bins[(ordered >> shift) & (kBins - 1)], by_mass ? mass(z, most) : 1ull);
    }
    __syncthreads();
    for (int32_t group = threadIdx.x; group < kBins / kGroup; group += blockDim.x) {
      unsigned long long sum = 0;
      for (int32_t bin = 0; bin < kGroup; ++bin) sum += shared.bins[group * kGroup + bin];
      shared.groups[group] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t group = kBins / kGroup - 1;
      while (group > 0 && shared.groups[group] < shared.left) shared.left -= shared.groups[group--];
      int32_t bin = group * kGroup + kGroup - 1;
      while (bin > group * kGroup && shared.bins[bin] < shared.left) shared.left -= shared.bins[bin--];
      shared.prefix = prefix << 8 | static_cast<uint32_t>(bin);
    }
    __syncthreads();
  }
  const float found = float_of_ordered(shared.prefix);
  __syncthreads();
  return found;
}

template <class Element>
SSD_DEVICE unsigned long long total_mass(const SampleRow<Element>& row, SampleShared& shared, float floor, float most) {
  if (threadIdx.x == 0) shared.left = 0;
  __syncthreads();
  unsigned long long sum = 0;
  for (int64_t token = threadIdx.x; token < row.vocabulary; token += blockDim.x) {
    const float z = row.z(token);
    if (z >= floor) sum += mass(z, most);
  }
  atomicAdd(&shared.left, sum);
  __syncthreads();
  const unsigned long long total = shared.left;
  __syncthreads();
  return total;
}

// This thread's best token after (score, token) in the ranking, among z >= floor; -1 where there is none. NaN counts as
// +inf, which is before everything: a row that has either shows it in its first place.
template <class Element>
SSD_DEVICE void best_after(const SampleRow<Element>& row, float floor, double& score, int64_t& token) {
  const double last_score = score;
  const int64_t last_token = token;
  score = -INFINITY;
  token = -1;
  for (int64_t candidate = threadIdx.x; candidate < row.vocabulary; candidate += blockDim.x) {
    float z = row.z(candidate);
    if (!(z < INFINITY)) z = INFINITY;
    if (!(z >= floor) || !(z > -INFINITY)) continue;
    double noised = z;
    if (row.temperature != 0.0f) {
      const uint32_t bits = token_noise_bits(row.key, candidate);
      if (static_cast<double>(z) + noise_bound(bits) < score) continue;
      noised += gumbel_noise(bits);
    }
    if (noised > score && is_before(last_score, last_token, noised, candidate)) {
      score = noised;
      token = candidate;
    }
  }
}

template <class Element>
SSD_KERNEL SSD_BOUNDS(kMaxThreads) sample_shared_noise_kernel(SampleArgs args) {
  SSD_SHARED(SampleShared, shared);
  const int64_t index = blockIdx.x;
  const double temperature = args.temperature[index], top_p = args.top_p[index], min_p = args.min_p[index];
  const int64_t top_k = args.top_k[index];
  const SampleRow<Element> row{static_cast<const Element*>(args.logits) + index * args.logit_stride, args.vocabulary,
                               noise_key(args.seeds[index], args.positions[index], args.first_token),
                               static_cast<float>(temperature)};
  float floor = -INFINITY;
  const bool cuts_k = top_k > 0 && top_k < args.vocabulary;
  if (temperature != 0.0 && (cuts_k || top_p < 1.0 || min_p > 0.0)) {
    double most_here = -INFINITY;
    for (int64_t token = threadIdx.x; token < row.vocabulary; token += blockDim.x) {
      const double z = row.z(token);
      most_here = z > most_here ? z : most_here;
    }
    reduce_best(shared, most_here, threadIdx.x);
    const float most = static_cast<float>(shared.scores[0]);
    __syncthreads();
    if (most > -INFINITY && most < INFINITY) {
      if (cuts_k) floor = weighted_floor(row, shared, floor, false, most, static_cast<unsigned long long>(top_k));
      if (top_p < 1.0) {
        const double wanted = ceil(top_p * static_cast<double>(total_mass(row, shared, floor, most)));
        floor = weighted_floor(row, shared, floor, true, most,
                               wanted < 1.0 ? 1ull : static_cast<unsigned long long>(wanted));
      }
      if (min_p > 0.0) {
        const float least = most + static_cast<float>(log(static_cast<double>(static_cast<float>(min_p))));
        floor = least > floor ? least : floor;
      }
    }
  }
  // Every thread brings its best; the winner's thread looks for its next one.
  double score = INFINITY;
  int64_t token = -1;
  best_after(row, floor, score, token);
  for (int64_t place = 0; place < args.count; ++place) {
    reduce_best(shared, score, token < 0 ? INT64_MAX : token);
    const double best_score = shared.scores[0];
    const bool found = best_score > -INFINITY && best_score < INFINITY;
    const int64_t best_token = found ? shared.tokens[0] : -1;
    __syncthreads();
    if (threadIdx.x == 0) {
      args.tokens[index * args.count + place] = found ? args.first_token + best_token : -1;
      args.scores[index * args.count + place] = best_score < INFINITY ? best_score : NAN;
    }
    if (found && token == best_token) best_after(row, floor, score, token);
  }
}

}  // namespace ssd
