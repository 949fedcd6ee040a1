// What Hopper does beside the threads of the blocks of a cluster: barriers in shared memory, copies of tiles by the TMA
// unit, products of warpgroups. It is as unkind as the PTX ISA allows: copies land in any order and apart from each
// other in every block, products read shared memory at any time between their beginning and the wait, the accumulators
// hold garbage until then, and what a thread has stored is not there for a product until that thread has said the
// fence.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "machine.h"

namespace danet::cuda_host {

// A tensor [batches, lines, length] of 16-bit elements as the TMA unit sees it; strides in elements.
struct TensorView {
  const uint16_t* data;
  int64_t batches, lines, length, batch_stride, line_stride;
  int box_lines, box_length;
};

// A product of one warp, a quarter of one of its warpgroup: [16, columns] from A [16, 16] and B [16, columns].
struct Product {
  int columns;
  bool add;
  bool a_is_shared;
  uint64_t a_matrix, b_matrix;
  bool a_row_lines = false;                 // whether lines of A run along its rows
  bool b_row_lines;                         // whether lines of B run along its columns
  std::array<const uint32_t*, kLanes> a;    // registers, [4] of each lane
  std::array<float*, kLanes> acc;           // [columns / 2] of each lane
  float (*value)(uint16_t);
  bool done = false;
};

class Hopper {
 public:
  explicit Hopper(Machine& machine);

  // Lets something happen that no thread does; something it is to be if `must`. Returns whether anything did.
  bool go_on(bool must);

  // By threads.
  void init_barrier(const void* barrier, int arrivals);
  void arrive(const void* barrier, int64_t bytes_to_come);
  void wait(const void* barrier, int parity);
  void meet(int number, int threads);  // of the block
  void meet_cluster();
  void fence();
  void load_tile(char* shared, const TensorView& view, int64_t element, int64_t line, int64_t batch,
                 const void* barrier, int ranks);
  void store_16(char* shared, const void* bytes);
  const char* same_place(const void* shared, int rank) const;  // of another block of the cluster
  uint32_t shared_address(const void* shared) const;

  // By warps together.
  void begin_products(int warp);
  void begin(int warp, const Product& product);
  void commit(int warp);
  void wait_for_products(int warp, size_t pending);

 private:
  struct BarrierState {
    int arrivals, missing;
    int64_t bytes = 0;  // that are announced and have not come; below 0 if they came first
    unsigned phase = 0;
  };
  struct Meeting {
    int arrived = 0;
    unsigned number = 0;
  };
  struct Sum {
    std::vector<float> values;  // [16, columns]
    int products = 0;           // that have not been delivered
  };
  struct Warp {
    bool fenced = false;
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    std::map<float*, Sum> sums;  // by the accumulators of lane 0
  };

  BarrierState* find(const void* barrier);
  void end_phase(BarrierState& state);
  void come_together(Meeting& meeting, int threads, const char* name);
  void land(char* to, const TensorView& view, int64_t element, int64_t line, int64_t batch, const void* barrier);
  void multiply_some(int warp);
  void multiply(int warp, Product& product);
  void deliver(Warp& warp, Product& product);
  float read(int warp, uint64_t matrix, bool row_lines, int row, int depth, float (*value)(uint16_t));

  Machine& machine_;
  std::map<const void*, BarrierState> barriers_;
  std::map<std::pair<int, int>, Meeting> meetings_;  // by rank and number
  Meeting cluster_;
  std::vector<std::function<void()>> copies_;        // under way
  std::unordered_map<const char*, int> unfenced_;    // 16 bytes, and the thread that has stored them
  std::vector<Warp> warps_;
};

}  // namespace danet::cuda_host
