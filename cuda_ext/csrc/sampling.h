// One draw under shared noise. Knows no torch.
#pragma once

#include "kernels.h"

namespace ssd {

struct Draw {
  double temperature, top_p, min_p;
  int64_t top_k, key;
};

// Ranks one row of logits; z and buffer hold `count` floats each. A row with a NaN or +inf gets NaN for its scores.
void rank_row(const Kernels& kernels, const void* logits, Dtype dtype, int64_t count, const Draw& draw, float* z,
              float* buffer, Ranking& ranking);

}  // namespace ssd
