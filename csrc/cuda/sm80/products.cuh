// Products of matrices in shared memory, or in registers, by one warp. The accumulators of a tile [16 rows, 8 columns]
// are spread over the warp as ptx/mma.cuh says: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
#pragma once

#include "ptx/device.cuh"
#include "ptx/mma.cuh"
#include "sm80/tile.cuh"

namespace danet {

DANET_DEVICE int lane_index() { return thread_index() % 32; }
DANET_DEVICE int warp_index() { return thread_index() / 32; }

// Row of accumulators e = 0, 1 (first) and 2, 3 (+ 8) within their tile; and the column of e.
DANET_DEVICE int accumulator_row(int e) { return lane_index() / 4 + e / 2 * 8; }
DANET_DEVICE int accumulator_column(int e) { return lane_index() % 4 * 2 + e % 2; }

// bf16 and fp16: exact products, fp32 sums.
template <class T>
struct Products {
  static constexpr int kDepth = 16;    // of one instruction
  static constexpr int kUnrolled = 2;  // steps of a loop over the depth: more would need too many registers
  struct A { uint32_t registers[4]; };  // [16, kDepth]
  struct B { uint32_t registers[2]; };  // [kDepth, 8]

  template <class M>
  static DANET_DEVICE A load_a(const M& matrix, int row, int depth) {
    A a;
    const int lane = lane_index();
    const T* address = M::kDepthContiguous
                           ? matrix.at(row + lane % 16, depth + lane / 16 * 8)
                           : matrix.at(row + lane / 8 % 2 * 8, depth + lane % 8 + lane / 16 * 8);
    ldmatrix_x4(a.registers, address, !M::kDepthContiguous);
    return a;
  }

  // Two tiles side by side: rows `row` to `row` + 15 of the matrix [rows, depth] are the columns of the product.
  template <class M>
  static DANET_DEVICE void load_b(B (&b)[2], const M& matrix, int row, int depth) {
    uint32_t registers[4];
    const int lane = lane_index();
    const T* address = M::kDepthContiguous
                           ? matrix.at(row + lane % 8 + lane / 16 * 8, depth + lane / 8 % 2 * 8)
                           : matrix.at(row + lane / 16 * 8, depth + lane % 16);
    ldmatrix_x4(registers, address, !M::kDepthContiguous);
    b[0] = {{registers[0], registers[1]}};
    b[1] = {{registers[2], registers[3]}};
  }

  // A [16, kDepth] from the accumulators of the tiles that cover it, rounded.
  static DANET_DEVICE A from_accumulators(const float (*tiles)[4]) {
    return {{pack<T>(tiles[0][0], tiles[0][1]), pack<T>(tiles[0][2], tiles[0][3]), pack<T>(tiles[1][0], tiles[1][1]),
             pack<T>(tiles[1][2], tiles[1][3])}};
  }

  static DANET_DEVICE void multiply(float (&acc)[4], const A& a, const B& b, bool /*precise*/) {
    mma_16x8x16<T>(acc, a.registers, b.registers);
  }
};

// fp32: each operand is rounded to TF32; if `precise`, what rounding takes away enters in two more products, and the
// result is as good as in fp32. Depth d of a tile is at register place d / 2 + 4 (d % 2): any order serves, if it is
// the same for A and B, and accumulators become an A in this one without moving between lanes.
template <>
struct Products<float> {
  static constexpr int kDepth = 8;
  static constexpr int kUnrolled = 2;
  struct A { uint32_t high[4], low[4]; };
  struct B { uint32_t high[2], low[2]; };

  template <class M>
  static DANET_DEVICE A load_a(const M& matrix, int row, int depth) {
    const int r = row + lane_index() / 4, d = depth + lane_index() % 4 * 2;
    A a;
    split(*matrix.at(r, d), a.high[0], a.low[0]);
    split(*matrix.at(r + 8, d), a.high[1], a.low[1]);
    split(*matrix.at(r, d + 1), a.high[2], a.low[2]);
    split(*matrix.at(r + 8, d + 1), a.high[3], a.low[3]);
    return a;
  }

  template <class M>
  static DANET_DEVICE void load_b(B (&b)[2], const M& matrix, int row, int depth) {
    const int d = depth + lane_index() % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int r = row + 8 * tile + lane_index() / 4;
      split(*matrix.at(r, d), b[tile].high[0], b[tile].low[0]);
      split(*matrix.at(r, d + 1), b[tile].high[1], b[tile].low[1]);
    }
  }

  static DANET_DEVICE A from_accumulators(const float (*tiles)[4]) {
    A a;
    split(tiles[0][0], a.high[0], a.low[0]);
    split(tiles[0][2], a.high[1], a.low[1]);
    split(tiles[0][1], a.high[2], a.low[2]);
    split(tiles[0][3], a.high[3], a.low[3]);
    return a;
  }

  static DANET_DEVICE void multiply(float (&acc)[4], const A& a, const B& b, bool precise) {
    mma_16x8x8(acc, a.high, b.high);
    if (!precise) return;
    float correction[4] = {};
    mma_16x8x8(correction, a.low, b.high);
    mma_16x8x8(correction, a.high, b.low);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (correction[e] == correction[e]) acc[e] += correction[e];
    }
  }

 private:
  static DANET_DEVICE void split(float x, uint32_t& high, uint32_t& low) {
    high = round_to_tf32(x);
    low = float_bits(x - tf32_value(high));  // NaN of an infinity: no correction where it has a part
  }
};

// acc [16 kRowTiles, 8 kColumnTiles] += a [rows from a_row, depth] b [rows from b_row, depth]^T. Of the kDepth that the
// matrices have, those up to `depth` count.
template <int kDepth, class MA, class MB, int kRowTiles, int kColumnTiles>
DANET_DEVICE void multiply(float (&acc)[kRowTiles][kColumnTiles][4], const MA& a, int a_row, const MB& b, int b_row,
                           int depth, bool precise) {
  using P = Products<typename MA::Element>;
  static_assert(kDepth % P::kDepth == 0 && kColumnTiles % 2 == 0, "whole instructions, B in pairs");
#pragma unroll P::kUnrolled
  for (int d = 0; d < kDepth; d += P::kDepth) {
    if (d >= depth) break;
    typename P::A left[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) left[r] = P::load_a(a, a_row + 16 * r, d);
#pragma unroll
    for (int c = 0; c < kColumnTiles; c += 2) {
      typename P::B right[2];
      P::load_b(right, b, b_row + 8 * c, d);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        P::multiply(acc[r][c], left[r], right[0], precise);
        P::multiply(acc[r][c + 1], left[r], right[1], precise);
      }
    }
  }
}

// acc [16 kRowTiles, 8 kColumnTiles] += weights [rows, 8 kDepthTiles] b [rows from b_row, depth]^T, where the weights
// are accumulators of an earlier product, rounded here to the type of b.
template <class MB, int kRowTiles, int kDepthTiles, int kColumnTiles>
DANET_DEVICE void multiply_weights(float (&acc)[kRowTiles][kColumnTiles][4],
                                   const float (&weights)[kRowTiles][kDepthTiles][4], const MB& b, int b_row,
                                   bool precise) {
  using P = Products<typename MB::Element>;
  static_assert(kColumnTiles % 2 == 0 && 8 * kDepthTiles % P::kDepth == 0, "whole instructions, B in pairs");
#pragma unroll
  for (int d = 0; d < kDepthTiles; d += P::kDepth / 8) {
    typename P::A left[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) left[r] = P::from_accumulators(&weights[r][d]);
#pragma unroll
    for (int c = 0; c < kColumnTiles; c += 2) {
      typename P::B right[2];
      P::load_b(right, b, b_row + 8 * c, 8 * d);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        P::multiply(acc[r][c], left[r], right[0], precise);
        P::multiply(acc[r][c + 1], left[r], right[1], precise);
      }
    }
  }
}

// Every element of a product times `factor`.
template <int kRowTiles, int kColumnTiles>
DANET_DEVICE void multiply_by(float (&s)[kRowTiles][kColumnTiles][4], float factor) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[r][c][e] *= factor;
    }
  }
}

// Columns from `columns` on become -inf: logits that do not count.
template <int kRowTiles, int kColumnTiles>
DANET_DEVICE void exclude_columns(float (&s)[kRowTiles][kColumnTiles][4], int columns) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * c + accumulator_column(e) >= columns) s[r][c][e] = -infinity();
      }
    }
  }
}

}  // namespace danet
