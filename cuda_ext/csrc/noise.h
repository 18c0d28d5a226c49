// Numbers the kernels of CPU and GPU must agree on to the bit: bfloat16, shared noise, the order of floats.
//
// The vectorised twin of noise_bits is in sampling.inc; the oracle of both is ssd_runtime/speculation/noise.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "indexing.h"

namespace ssd {

struct Bfloat16Bits {
  uint16_t bits;
};

SSD_HD uint32_t float_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

SSD_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

SSD_HD float to_float(float value) { return value; }
SSD_HD float to_float(Bfloat16Bits value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

SSD_HD void from_float(float value, float& out) { out = value; }
SSD_HD void from_float(float value, Bfloat16Bits& out) {  // to nearest, halves to even
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    out.bits = 0x7FC0;
  } else {
    out.bits = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
}

// Unsigned integers in the order of the floats they stand for; not for NaN.
SSD_HD uint32_t ordered_bits(float value) {
  const uint32_t bits = float_bits(value);
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}
SSD_HD float float_of_ordered(uint32_t ordered) {
  return float_of(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u, kMix1 = 0xBF58476D1CE4E5B9u, kMix2 = 0x94D049BB133111EBu;

SSD_HD uint64_t splitmix64(uint64_t value) {
  value += kGolden;
  value = (value ^ (value >> 30)) * kMix1;
  value = (value ^ (value >> 27)) * kMix2;
  return value ^ (value >> 31);
}

// The key of one position of one request, for logits whose first column is that of `first_token`.
SSD_HD int64_t noise_key(int64_t seed, int64_t position, int64_t first_token) {
  const uint64_t key = splitmix64(splitmix64(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(position));
  return static_cast<int64_t>(key + kGolden * static_cast<uint64_t>(first_token));
}

// The upper 32 bits of splitmix64(key + token * golden).
SSD_HD uint32_t token_noise_bits(int64_t key, int64_t token) {
  return static_cast<uint32_t>(splitmix64(static_cast<uint64_t>(key) + kGolden * static_cast<uint64_t>(token)) >> 32);
}

SSD_HD double gumbel_noise(uint32_t bits) {
  return -log(-log((static_cast<double>(bits) + 0.5) * 0x1p-32));
}

// Never below the noise: -log(-log u) <= -log(1 - u), and -log2 of a float is at most 127 - (its bits / 2^23). A few
// operations, so that only tokens that may win pay for two logarithms in double precision.
SSD_HD float noise_bound(uint32_t bits) {
  const float rest = static_cast<float>((uint64_t{1} << 32) - bits);  // 2^32 (1 - u), about
  return (159.0f - static_cast<float>(float_bits(rest)) * (1.0f / 8388608.0f)) * 0.69314718f + 1e-3f;
}

}  // namespace ssd
