// SIMD without intrinsics: loops that the compiler vectorises once per instruction set (DANET_SIMD) and an exp that it can.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// A function marked DANET_SIMD is compiled for AVX-512, AVX2 and the baseline; the loader picks one on the machine it runs on.
// Sanitizers cannot instrument the resolver that does the picking, and clang has no such architecture levels: baseline there.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(DANET_SANITIZE)
#if __GNUC__ >= 12
#define DANET_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DANET_SIMD __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#endif
#else
#define DANET_SIMD
#endif

#define DANET_INLINE inline __attribute__((always_inline))
#define DANET_RESTRICT __restrict__

namespace danet {

// Columns that the tile loops take at a time: their running statistics stay in registers.
constexpr int64_t kLanes = 64;

// e^x for x <= 88 or so (a softmax only asks for x <= 0, up to rounding). NaN stays NaN; what would be subnormal is 0.
// x = n log 2 + r with |r| <= log(2) / 2; n comes from adding 1.5 * 2^23, whose low mantissa bits then hold it.
DANET_INLINE float fast_exp(float x) {
  constexpr float kLowest = -87.3f;
  const float clamped = x < kLowest ? kLowest : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes' minimax polynomial for (e^r - 1 - r) / r^2
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  y = x != x ? x : y;
  return x < kLowest ? 0.0f : y;
}

// The same in fp64: Taylor to r^13 (relative error below 1e-17 for |r| <= log(2) / 2), log 2 split in two.
DANET_INLINE double fast_exp(double x) {
  constexpr double kLowest = -708.0;
  const double clamped = x < kLowest ? kLowest : x;
  const double shifted = clamped * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
  const double n = shifted - 6755399441055744.0;
  double r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  uint64_t exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 52;
  double y;
  std::memcpy(&y, &bits, sizeof y);
  y = x != x ? x : y;
  return x < kLowest ? 0.0 : y;
}

}  // namespace danet
