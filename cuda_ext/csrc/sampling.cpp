// Shared-noise sampling of one row: temperature, top-k, top-p, min-p, then the ranking under noise. Knows no torch.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace ssd {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The k-th largest of z, 0 < k < count. The k-th largest of the maxima of at least k runs is a lower bound on it, so
// that only a few values beyond k are left to select from.
float kth_largest(const Kernels& kernels, const float* z, int64_t count, int64_t k, float* buffer) {
  const int64_t run = std::max<int64_t>(count / (4 * k) / 16 * 16, 16);
  const int64_t runs = kernels.run_maxima(z, count, run, buffer);
  float bound = kNone;
  if (runs >= k) {
    std::nth_element(buffer, buffer + k - 1, buffer + runs, std::greater<float>());
    bound = buffer[k - 1];
  }
  const int64_t left = kernels.values_from(z, count, bound, buffer);
  if (left < k) return kNone;
  std::nth_element(buffer, buffer + k - 1, buffer + left, std::greater<float>());
  return buffer[k - 1];
}

// The smallest value of the nucleus: the least set of best tokens with probability >= top_p, among z >= floor.
float nucleus_floor(const Kernels& kernels, const float* z, int64_t count, float floor, float most, double top_p,
                    float* buffer) {
  const double total = std::log(kernels.sum_exp(z, count, floor, most));
  if (!std::isfinite(total)) return floor;
  float width = 2.0f;
  for (;;) {
    const float from = std::max(floor, most - width);
    const int64_t size = kernels.values_from(z, count, from, buffer);
    const double reached = kernels.sum_exp(buffer, size, kNone, most) / std::exp(total);
    const bool all = from == floor || width > 1e30f;
    if (!all && reached < top_p + 1e-9) {
      width *= 2.0f;
      continue;
    }
    std::sort(buffer, buffer + size, std::greater<float>());
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      sum += std::exp(static_cast<double>(buffer[i]) - most - total);
      if (sum >= top_p) return buffer[i];
    }
    return all ? floor : buffer[size - 1];
  }
}

}  // namespace

void rank_row(const Kernels& kernels, const void* logits, Dtype dtype, int64_t count, const Draw& draw, float* z,
              float* buffer, Ranking& ranking) {
  const bool greedy = draw.temperature == 0.0;
  const float most = kernels.scale_logits(logits, dtype, count, greedy ? 1.0f : static_cast<float>(draw.temperature), z);
  if (!(most < std::numeric_limits<float>::infinity())) {
    std::fill(ranking.scores, ranking.scores + ranking.count, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  if (greedy) return kernels.rank_greedy(z, count, ranking);
  float floor = kNone;
  if (draw.top_k > 0 && draw.top_k < count) floor = kth_largest(kernels, z, count, draw.top_k, buffer);
  if (draw.top_p < 1.0)
    floor = std::max(floor, nucleus_floor(kernels, z, count, floor, most, draw.top_p, buffer));
  if (draw.min_p > 0.0) floor = std::max(floor, most + std::log(static_cast<float>(draw.min_p)));
  kernels.rank_noised(z, count, floor, draw.key, ranking);
}

}  // namespace ssd
