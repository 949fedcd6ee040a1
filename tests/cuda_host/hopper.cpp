#include "hopper.h"

#include <bit>
#include <cstring>

#include "sanitizers.h"

namespace danet::cuda_host {
namespace {

constexpr uint32_t kFirstAddress = 1024;   // of shared memory, as instructions count; the rest is CUDA's own
constexpr uint32_t kUnderWay = 0x7fb0d00d;  // what accumulators hold until their products are waited for
constexpr uintptr_t kRepeat = 1024;        // bytes after which every swizzle repeats

// Where the 16 bytes at this address are, if lines have 64 or 128 bytes.
uintptr_t swizzled(uintptr_t address, int line_bytes) {
  return address ^ ((address >> 7 & static_cast<uintptr_t>(line_bytes / 16 - 1)) << 4);
}

}  // namespace

Hopper::Hopper(Machine& machine)
    : machine_(machine),
      warps_(static_cast<size_t>(machine.blocks_of_cluster() * machine.threads_of_block() / kLanes)) {}

bool Hopper::go_on(bool must) {
  auto& random = machine_.random();
  if (machine_.landing() == Landing::kAnyTime) {
    for (size_t warp = 0; warp < warps_.size(); ++warp) multiply_some(static_cast<int>(warp));
  }
  if (copies_.empty()) return false;
  if (!must && (machine_.landing() == Landing::kLate || random() % 4 != 0)) return false;
  const size_t which = machine_.landing() == Landing::kLate ? copies_.size() - 1 : random() % copies_.size();
  const auto copy = std::move(copies_[which]);
  copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(which));
  copy();
  return true;
}

// As many as chance will have, of those that this warp has under way, in order.
void Hopper::multiply_some(int warp) {
  for (auto& group : warps_[static_cast<size_t>(warp)].groups) {
    for (Product& product : group) {
      if (product.done) continue;
      if (machine_.random()() % 4 != 0) return;
      multiply(warp, product);
    }
  }
}

// ---- barriers

void Hopper::init_barrier(const void* barrier, int arrivals) {
  if (barriers_.count(barrier) != 0) machine_.fail("initialises a barrier a second time");
  BarrierState state{};
  state.arrivals = state.missing = arrivals;
  barriers_[barrier] = state;
}

Hopper::BarrierState* Hopper::find(const void* barrier) {
  const auto found = barriers_.find(barrier);
  return found == barriers_.end() ? nullptr : &found->second;
}

void Hopper::end_phase(BarrierState& state) {
  if (state.missing > 0 || state.bytes != 0) return;
  state.missing = state.arrivals;
  ++state.phase;
}

void Hopper::arrive(const void* barrier, int64_t bytes_to_come) {
  BarrierState* const state = find(barrier);
  if (state == nullptr) machine_.fail("arrives at a barrier that is none");
  if (state->missing == 0) machine_.fail("arrives at a barrier where all arrivals of the phase have come");
  release(const_cast<void*>(barrier));
  --state->missing;
  state->bytes += bytes_to_come;
  end_phase(*state);
}

void Hopper::wait(const void* barrier, int parity) {
  BarrierState* const state = find(barrier);
  if (state == nullptr) machine_.fail("waits at a barrier that is none");
  machine_.wait_until("a phase of a barrier", [=] { return static_cast<int>(state->phase % 2) != parity; });
  acquire(const_cast<void*>(barrier));
}

void Hopper::come_together(Meeting& meeting, int threads, const char* name) {
  release(&meeting);
  const unsigned number = meeting.number;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.number;
  } else {
    machine_.wait_until(name, [&meeting, number] { return meeting.number != number; });
  }
  acquire(&meeting);
}

void Hopper::meet(int number, int threads) {
  come_together(meetings_[{machine_.rank(), number}], threads, "the threads of a named barrier");
}

void Hopper::meet_cluster() {
  come_together(cluster_, machine_.blocks_of_cluster() * machine_.threads_of_block(), "the threads of its cluster");
}

// ---- shared memory

const char* Hopper::same_place(const void* shared, int rank) const {
  return machine_.shared_of(rank) + (static_cast<const char*>(shared) - machine_.shared());
}

// With the low bits that the memory here has, on which swizzles depend.
uint32_t Hopper::shared_address(const void* shared) const {
  const uintptr_t base = reinterpret_cast<uintptr_t>(machine_.shared()) & ~(kRepeat - 1);
  return kFirstAddress + static_cast<uint32_t>(reinterpret_cast<uintptr_t>(shared) - base);
}

void Hopper::store_16(char* shared, const void* bytes) {
  std::memcpy(shared, bytes, 16);
  unfenced_[shared] = machine_.thread_of_cluster();
}

void Hopper::fence() {
  const int thread = machine_.thread_of_cluster();
  std::erase_if(unfenced_, [=](const auto& stored) { return stored.second == thread; });
}

// ---- copies

void Hopper::load_tile(char* shared, const TensorView& view, int64_t element, int64_t line, int64_t batch,
                       const void* barrier, int ranks) {
  machine_.check_aligned("a copy of a tile", shared, 128);
  const char* const end = shared + view.box_lines * view.box_length * 2;
  if (shared < machine_.shared() || end > machine_.shared() + machine_.shared_bytes()) {
    machine_.fail("copies a tile to outside of shared memory");
  }
  for (int rank = 0; rank < machine_.blocks_of_cluster(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    char* const to = const_cast<char*>(same_place(shared, rank));
    const char* const counter = same_place(barrier, rank);
    copies_.push_back([=, this] { land(to, view, element, line, batch, counter); });
    if (machine_.landing() == Landing::kAtOnce) {
      copies_.back()();
      copies_.pop_back();
    }
  }
}

void Hopper::land(char* to, const TensorView& view, int64_t element, int64_t line, int64_t batch,
                  const void* barrier) {
  BarrierState* const state = find(barrier);
  if (state == nullptr) return machine_.note("has copied a tile whose bytes are counted by no barrier");
  const auto inside = [](int64_t x, int64_t size) { return x >= 0 && x < size; };
  const int line_bytes = view.box_length * 2;
  for (int l = 0; l < view.box_lines; ++l) {
    for (int e = 0; e < view.box_length; ++e) {
      const bool exists =
          inside(batch, view.batches) && inside(line + l, view.lines) && inside(element + e, view.length);
      const uint16_t value =
          exists ? view.data[batch * view.batch_stride + (line + l) * view.line_stride + element + e] : uint16_t{0};
      const uintptr_t address = reinterpret_cast<uintptr_t>(to) + static_cast<uintptr_t>(l * line_bytes + 2 * e);
      std::memcpy(reinterpret_cast<char*>(swizzled(address, line_bytes)), &value, 2);
    }
  }
  state->bytes -= view.box_lines * line_bytes;
  end_phase(*state);
}

// ---- products

void Hopper::begin_products(int warp) { warps_[static_cast<size_t>(warp)].fenced = true; }

void Hopper::begin(int warp, const Product& product) {
  Warp& own = warps_[static_cast<size_t>(warp)];
  if (!own.fenced) return machine_.note("begins a product without begin_products");
  const size_t columns = static_cast<size_t>(product.columns);
  Sum& sum = own.sums[product.acc[0]];
  if (sum.products++ == 0) {
    sum.values.resize(16 * columns);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t i = 0; i < columns / 2; ++i) {
        const size_t row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        sum.values[row * columns + column] = product.acc[lane][i];
        product.acc[lane][i] = std::bit_cast<float>(kUnderWay);
      }
    }
  }
  own.open.push_back(product);
  if (machine_.landing() == Landing::kAtOnce) multiply(warp, own.open.back());
}

void Hopper::commit(int warp) {
  Warp& own = warps_[static_cast<size_t>(warp)];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
  own.fenced = false;
}

void Hopper::wait_for_products(int warp, size_t pending) {
  Warp& own = warps_[static_cast<size_t>(warp)];
  if (!own.open.empty()) return machine_.note("waits for products that it has not committed");
  while (own.groups.size() > pending) {
    for (Product& product : own.groups.front()) {
      if (!product.done) multiply(warp, product);
      deliver(own, product);
    }
    own.groups.pop_front();
  }
}

void Hopper::deliver(Warp& warp, Product& product) {
  Sum& sum = warp.sums.at(product.acc[0]);
  if (--sum.products > 0) return;
  const size_t columns = static_cast<size_t>(product.columns);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t i = 0; i < columns / 2; ++i) {
      const size_t row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (std::bit_cast<uint32_t>(product.acc[lane][i]) != kUnderWay) {
        return machine_.note("has touched accumulators of a product that was under way");
      }
      product.acc[lane][i] = sum.values[row * columns + column];
    }
  }
  warp.sums.erase(product.acc[0]);
}

// Sums are rounded to fp32 one after another; hardware adds several products at a time and truncates.
void Hopper::multiply(int warp, Product& product) {
  const size_t columns = static_cast<size_t>(product.columns);
  std::vector<float>& sums = warps_[static_cast<size_t>(warp)].sums.at(product.acc[0]).values;
  float a[16][16];
  for (int row = 0; row < 16; ++row) {
    for (int depth = 0; depth < 16; ++depth) {
      if (product.a_is_shared) {
        a[row][depth] = read(warp, product.a_matrix, product.a_row_lines, warp % 4 * 16 + row, depth, product.value);
      } else {
        const uint32_t both = product.a[static_cast<size_t>(row % 8 * 4 + depth % 8 / 2)][row / 8 + depth / 8 * 2];
        a[row][depth] = product.value(static_cast<uint16_t>(both >> depth % 2 * 16));
      }
    }
  }
  if (!product.add) std::fill(sums.begin(), sums.end(), 0.0f);
  std::vector<float> b(columns);
  for (int depth = 0; depth < 16; ++depth) {
    for (size_t column = 0; column < columns; ++column) {
      b[column] = read(warp, product.b_matrix, product.b_row_lines, static_cast<int>(column), depth, product.value);
    }
    for (size_t row = 0; row < 16; ++row) {
      float* const to = &sums[row * columns];
      for (size_t column = 0; column < columns; ++column) to[column] += a[row][depth] * b[column];
    }
  }
  product.done = true;
}

// An element of a matrix [rows, depth] as the PTX ISA lays out its canonical swizzled layouts: groups of eight lines;
// in lines along the depth a group has eight rows, in lines along the rows eight depths.
float Hopper::read(int warp, uint64_t matrix, bool row_lines, int row, int depth, float (*value)(uint16_t)) {
  const auto field = [&](int first) { return static_cast<uintptr_t>(matrix >> first & 0x3fff) << 4; };
  const int line_bytes = matrix >> 62 == 1 ? 128 : matrix >> 62 == 2 ? 64 : 0;
  if (line_bytes == 0) return machine_.note("multiplies a matrix with a swizzle that is not in use"), 0.0f;
  const int line = row_lines ? depth : row, length = line_bytes / 2;
  const int along = row_lines ? row : depth;
  if (!row_lines && along >= length) return machine_.note("multiplies more than a line"), 0.0f;
  const uintptr_t offset = static_cast<uintptr_t>(line / 8) * field(32) +
                           static_cast<uintptr_t>(line % 8 * line_bytes + along % length * 2) +
                           static_cast<uintptr_t>(along / length) * field(16);
  char* const shared = machine_.shared_of(warp / (machine_.threads_of_block() / kLanes));
  const uintptr_t base = reinterpret_cast<uintptr_t>(shared) & ~(kRepeat - 1);
  const uintptr_t address = swizzled(base + field(0) - kFirstAddress + offset, line_bytes);
  const char* const at = reinterpret_cast<const char*>(address);
  if (at < shared || at + 2 > shared + machine_.shared_bytes()) {
    return machine_.note("multiplies what is outside of shared memory"), 0.0f;
  }
  if (!unfenced_.empty() && unfenced_.count(reinterpret_cast<const char*>(address & ~uintptr_t{15})) != 0) {
    return machine_.note("multiplies what a thread has stored without a fence after it"), 0.0f;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return value(bits);
}

}  // namespace danet::cuda_host
