// Tiles of operands [B, channels, positions], from global to shared memory.
//
// All operands of a call lie the same way: in lines of contiguous elements along positions (NCHW), or along channels
// (channels_last). That is known when a kernel is compiled, so that addresses within tiles are constants: a kernel
// holds the code for both and takes one way or the other at its beginning, see DANET_FOR_LAYOUT.
#pragma once

#include "ptx/cp_async.cuh"
#include "ptx/device.cuh"

namespace danet {

// [B, channels, positions] in global memory. Every line begins on a 16-byte boundary; what lies behind its end is never
// read.
template <class T>
struct Operand {
  const T* data;
  int64_t batch_stride;
  int64_t line_stride;
  int channels;
  int positions;
};

// A matrix [rows, depth] in shared memory; products sum over the depth.
// kLine: elements from one line to the next; kDepthContiguous: whether lines run along the depth.
template <class T, int kLine, bool kDepthContiguous_>
struct Matrix {
  using Element = T;
  static constexpr bool kDepthContiguous = kDepthContiguous_;

  const T* data;

  DANET_DEVICE const T* at(int row, int depth) const {
    return kDepthContiguous ? data + row * kLine + depth : data + depth * kLine + row;
  }
};

// A tile [kChannels, kPositions] in shared memory, in lines as its operand has them. 16 bytes between lines keep rows
// of the loads of products apart in the banks.
template <class T, int kChannels, int kPositions, bool kChannelsLast>
struct Tile {
  static constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // elements of one copy
  static_assert(kChannels % kWide == 0 && kPositions % kWide == 0, "lines are copied 16 bytes at a time");
  static constexpr int kLines = kChannelsLast ? kPositions : kChannels;
  static constexpr int kLength = kChannelsLast ? kChannels : kPositions;
  static constexpr int kLine = kLength + kWide;
  static constexpr int kBytes = kLines * kLine * static_cast<int>(sizeof(T));

  T* data;

  // Rows are positions, the depth is channels; and the reverse.
  DANET_DEVICE Matrix<T, kLine, kChannelsLast> by_position() const { return {data}; }
  DANET_DEVICE Matrix<T, kLine, !kChannelsLast> by_channel() const { return {data}; }

  // Begin to copy the tile at [batch, first_channel, first_position]; zeros outside of the operand. The copies belong
  // to the group that the caller commits.
  template <int kThreads>
  DANET_DEVICE void load(const Operand<T>& from, int64_t batch, int first_channel, int first_position) const {
    constexpr int kCopiesPerLine = kLength / kWide, kLinesAtOnce = kThreads / kCopiesPerLine;
    static_assert(kThreads % kCopiesPerLine == 0 && kLines % kLinesAtOnce == 0, "every thread copies as much");
    const int first_line = kChannelsLast ? first_position : first_channel;
    const int first_element = kChannelsLast ? first_channel : first_position;
    const int line = thread_index() / kCopiesPerLine, element = thread_index() % kCopiesPerLine * kWide;
    const int lines = (kChannelsLast ? from.positions : from.channels) - first_line - line;  // that are left
    const int left = (kChannelsLast ? from.channels : from.positions) - first_element - element;
    const int bytes = (left <= 0 ? 0 : left < kWide ? left : kWide) * static_cast<int>(sizeof(T));
    const int64_t offset = batch * from.batch_stride + (first_line + line) * from.line_stride;
    const T* source = from.data + offset + first_element + element;
    T* const to = data + line * kLine + element;
#pragma unroll 1  // more addresses at a time would take registers of the accumulators
    for (int next = 0; next < kLines; next += kLinesAtOnce) {
      const bool inside = next < lines && bytes > 0;
      // An address that is not read must still be a legal one.
      cp_async_16(to + next * kLine, inside ? source : from.data, inside ? bytes : 0);
      source += kLinesAtOnce * from.line_stride;
    }
  }
};

// In a kernel with parameters p: the same body for either way that operands lie, as a function of a compile-time bool.
#define DANET_FOR_LAYOUT(body, T, p) \
  if ((p).channels_last) {           \
    body<T, true>(p);                \
  } else {                           \
    body<T, false>(p);               \
  }

}  // namespace danet
