// csrc/cuda/ptx/device.cuh for a CPU.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "machine.h"

#define DANET_DEVICE inline
#define DANET_KERNEL(threads, blocks_per_multiprocessor) inline void

// What a warp does together runs beside its lanes, on registers that are theirs: nothing that could be a race.
#define DANET_COLLECTIVE __attribute__((no_sanitize("thread"))) inline void

namespace danet {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline int thread_index() { return cuda_host::Machine::current().thread(); }
inline int64_t block_index() { return cuda_host::Machine::current().block(); }
inline void synchronize() { cuda_host::Machine::current().barrier(); }
inline char* shared_memory() { return cuda_host::Machine::current().shared(); }

namespace cuda_host {

struct Shuffle {
  float value;
  int mask;
  float* result;
};

DANET_COLLECTIVE shuffle(const void* const* lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* own = static_cast<const Shuffle*>(lanes[lane]);
    *own->result = static_cast<const Shuffle*>(lanes[lane ^ own->mask])->value;
  }
}

}  // namespace cuda_host

inline float shuffle_xor(float value, int mask) {
  float result;
  const cuda_host::Shuffle arguments{value, mask, &result};
  cuda_host::Machine::current().collective("shuffle_xor", cuda_host::shuffle, &arguments);
  return result;
}

inline void atomic_add(float* address, float value) {
  std::atomic_ref<float>(*address).fetch_add(value, std::memory_order_relaxed);
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // ties to even; past the end: infinity
}
template <>
inline Float16 from_float<Float16>(float x) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace danet
