// csrc/cuda/ptx/mma.cuh for a CPU: which lane holds which elements is what the PTX ISA says. Products are exact and
// sums are rounded to fp32 one after another; hardware adds several products at a time and truncates.
#pragma once

#include "ptx/device.cuh"

namespace danet {
namespace cuda_host {

struct LoadMatrix {
  const uint16_t* row;
  const uint16_t** rows;  // a result: [kLanes], what every lane gave
};

DANET_COLLECTIVE exchange_rows(const void* const* lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int other = 0; other < kLanes; ++other) {
      static_cast<const LoadMatrix*>(lanes[lane])->rows[other] = static_cast<const LoadMatrix*>(lanes[other])->row;
    }
  }
}

struct Multiply {
  float* acc;         // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

// acc += A B, with A [16, kDepth] and B [kDepth, 8] gathered from the lanes.
template <int kDepth>
DANET_COLLECTIVE multiply(const void* const* lanes, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  float sums[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const float* const acc = static_cast<const Multiply*>(lanes[lane])->acc;
    for (int e = 0; e < 4; ++e) sums[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] = acc[e];
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* const acc = static_cast<const Multiply*>(lanes[lane])->acc;
    for (int e = 0; e < 4; ++e) acc[e] = sums[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  }
}

template <class T>
DANET_COLLECTIVE multiply_16x8x16(const void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* own = static_cast<const Multiply*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const auto value = [&](uint32_t both) { return to_float(T{static_cast<uint16_t>(both >> 16 * half)}); };
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * q + half + i / 2 * 8] = value(own->a[i]);
      for (int i = 0; i < 2; ++i) b[2 * q + half + i * 8][g] = value(own->b[i]);
    }
  }
  multiply(lanes, a, b);
}

DANET_COLLECTIVE multiply_16x8x8(const void* const* lanes) {
  float a[16][8], b[8][8];
  const auto value = [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); };  // the rest is not read
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* own = static_cast<const Multiply*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][q + i / 2 * 4] = value(own->a[i]);
    for (int i = 0; i < 2; ++i) b[q + i * 4][g] = value(own->b[i]);
  }
  multiply(lanes, a, b);
}

}  // namespace cuda_host

// Each lane reads what its registers get: to ThreadSanitizer a read by that thread.
inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row, bool transposed) {
  cuda_host::Machine& machine = cuda_host::Machine::current();
  machine.check_aligned("ldmatrix", row, 16);
  const uint16_t* rows[cuda_host::kLanes];
  const cuda_host::LoadMatrix arguments{static_cast<const uint16_t*>(row), rows};
  machine.collective("ldmatrix", cuda_host::exchange_rows, &arguments);
  const int lane = machine.thread() % cuda_host::kLanes, r = lane / 4, c = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const uint16_t low = transposed ? rows[8 * i + c][r] : rows[8 * i + r][c];
    const uint16_t high = transposed ? rows[8 * i + c + 1][r] : rows[8 * i + r][c + 1];
    registers[i] = low | static_cast<uint32_t>(high) << 16;
  }
}

template <class T>
void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const cuda_host::Multiply arguments{acc, a, b};
  cuda_host::Machine::current().collective("mma_16x8x16", cuda_host::multiply_16x8x16<T>, &arguments);
}

inline void mma_16x8x8(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const cuda_host::Multiply arguments{acc, a, b};
  cuda_host::Machine::current().collective("mma_16x8x8", cuda_host::multiply_16x8x8, &arguments);
}

inline float tf32_value(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }

// To nearest, ties away from zero; infinity and NaN stay.
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace danet
