// What a level of CPU kernels offers: plain C structs in, plain pointers out. Knows no torch.
//
// kernels.inc is compiled once per level (baseline, avx2, avx512); dispatch.cpp picks one at run time.
#pragma once

#include <cstdint>

namespace ssd {

enum class Dtype : int32_t { kFloat32, kBfloat16 };

// A panel holds the weights of kPanelOutputs output channels. One step is kStepBytes bytes of it: for each channel in
// turn the 4 bytes that meet 4 bytes of an activation row (4 int8, 2 bfloat16 or 1 float32 features). An int8 panel
// stores weight + 128 and ends in kPanelOutputs float32 scales.
//
// A grouped panel (kGrouped4, kGrouped8) is, for every kFeatureGroup input features in turn, 32 float16 scales and 32 float16
// minima (weight = scale * code + minimum), then the codes of 8 steps as they meet a row of int8 integers: a byte each,
// or four bits each, an even step in the low ones and the step after it in the high ones.
constexpr int64_t kPanelOutputs = 32;
constexpr int64_t kStepBytes = 4 * kPanelOutputs;
constexpr int64_t kMaxTileRows = 12;  // 24 accumulators, 2 weights and an activation fit 32 registers

constexpr int64_t kFeatureGroup = 32;                   // features that share a scale, in weights and in rows
constexpr int64_t kGroupWords = kFeatureGroup / 4 + 2;  // of a row: its integers, their scale, their scaled sum

enum class Weights : int32_t { kInt8, kBfloat16, kFloat32, kGrouped4, kGrouped8 };

inline bool is_grouped(Weights weights) { return weights == Weights::kGrouped4 || weights == Weights::kGrouped8; }
// Bytes of a group in a panel.
constexpr int64_t group_bytes(int64_t bits) { return 4 * kPanelOutputs + kPanelOutputs * kFeatureGroup * bits / 8; }

inline int64_t features_per_step(Weights weights) {
  return weights == Weights::kInt8 ? 4 : weights == Weights::kBfloat16 ? 2 : 1;
}
inline int64_t num_groups(int64_t in_features) { return (in_features + kFeatureGroup - 1) / kFeatureGroup; }
// 4-byte words of a row of activations as the kernels read it.
inline int64_t num_steps(Weights weights, int64_t in_features) {
  if (is_grouped(weights)) return num_groups(in_features) * kGroupWords;
  const int64_t per_step = features_per_step(weights);
  return (in_features + per_step - 1) / per_step;
}
inline int64_t num_panels(int64_t out_features) { return (out_features + kPanelOutputs - 1) / kPanelOutputs; }
inline int64_t panel_bytes(Weights weights, int64_t in_features) {
  if (is_grouped(weights)) return num_groups(in_features) * group_bytes(weights == Weights::kGrouped4 ? 4 : 8);
  return num_steps(weights, in_features) * kStepBytes + (weights == Weights::kInt8 ? 4 * kPanelOutputs : 0);
}

struct LinearArgs {
  Weights weights;
  Dtype dtype;  // of x and out
  int64_t num_rows, in_features, out_features;
  const void* x;
  int64_t x_stride;  // elements between rows
  const void* panels;
  const void* bias;  // or null
  Dtype bias_dtype;
  void* out;  // contiguous
};

struct NormArgs {
  Dtype dtype, weight_dtype;
  int64_t num_rows, num_features;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or null
  int64_t residual_stride;
  const void* weight;
  float eps;
  void* out;    // contiguous
  void* total;  // contiguous; x + residual, or null
};

struct SiluMulArgs {
  Dtype dtype;
  int64_t num_rows, num_features;  // features of the result
  const void* gate_up;
  int64_t stride;
  void* out;  // contiguous
};

struct RopeArgs {
  Dtype dtype, angle_dtype, kv_dtype;
  int64_t num_rows, num_heads, num_kv_heads, head_dim;
  void *q, *k;
  const void* v;
  int64_t q_strides[2], k_strides[2], v_strides[2];  // row, head
  const void *cos, *sin;  // null: nothing is rotated
  int64_t cos_stride, sin_stride;
  void* kv;
  int64_t kv_strides[3];  // key/value, slot, head
  const int64_t* slots;
};

struct AttentionArgs {
  Dtype dtype, kv_dtype;
  int64_t num_rows, num_heads, num_kv_heads, head_dim, chain_width;
  const void* q;
  int64_t q_strides[2];  // row, head
  const void* kv;
  int64_t kv_strides[3];  // key/value, slot, head
  const int64_t *sequence, *tables, *prefix, *chain;
  int64_t table_stride, chain_stride;
  float scale;
  void* out;  // contiguous
};

// The best of a row of noised logits so far: scores and tokens, best first.
struct Ranking {
  int64_t count, found;
  double* scores;
  int64_t* tokens;
};

struct Kernels {
  const char* level;
  // Bytes of scratch for the activations of a linear layer.
  int64_t (*linear_scratch)(const LinearArgs&);
  // Lays the activation rows out (quantized for all weights of 8 bits and less).
  void (*linear_prepare)(const LinearArgs&, char* scratch);
  // Computes the outputs of the panels [begin, end). A row's result depends on that row and the weights alone.
  void (*linear_panels)(const LinearArgs&, const char* scratch, int64_t begin, int64_t end);
  void (*rms_norm)(const NormArgs&);
  void (*silu_mul)(const SiluMulArgs&);
  void (*rope_write)(const RopeArgs&);
  // Attention of the key-value heads [begin, end).
  void (*paged_attention)(const AttentionArgs&, int64_t begin, int64_t end);
  // z = logits / temperature in float32; returns the largest, NaN if one is NaN.
  float (*scale_logits)(const void* logits, Dtype dtype, int64_t count, float temperature, float* z);
  // The largest of each run of `run` values (a multiple of 16) of z; returns how many runs.
  int64_t (*run_maxima)(const float* z, int64_t count, int64_t run, float* maxima);
  // The values of z that are at least `floor`, in order; returns how many.
  int64_t (*values_from)(const float* z, int64_t count, float floor, float* values);
  // Sum over z >= floor of e^(z - shift), in double precision.
  double (*sum_exp)(const float* z, int64_t count, float floor, float shift);
  // Ranks the tokens with z >= floor by z + noise under `key`, or by z alone.
  void (*rank_noised)(const float* z, int64_t count, float floor, int64_t key, Ranking&);
  void (*rank_greedy)(const float* z, int64_t count, Ranking&);
};

const Kernels& baseline_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// At least `bytes` of 64-byte aligned memory of the calling thread, valid until its next call.
char* thread_scratch(int64_t bytes);

// The best level this CPU runs; SSD_CPU_LEVEL in the environment asks for a lower one (for tests). Throws for a level
// that this CPU does not run.
const Kernels& kernels();

}  // namespace ssd
