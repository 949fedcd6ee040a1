// One multiprocessor, as far as CUDA C++ can tell, on one CPU thread: the threads of a block are fibers, blocks run one
// after another, those of a cluster side by side. The headers in ptx/ put the kernels' functions on top of it; what
// Hopper does beside its threads is in hopper.h.
//
// What it finds: wrong values, addresses outside of shared memory or not aligned, collectives that only some lanes of a
// warp reach, barriers that only some threads reach, copies that nobody waits for, and under ThreadSanitizer accesses
// that nothing orders. What it cannot see: hardware that reorders memory accesses within what the barriers allow, and
// how tensor cores round as they add.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace danet::cuda_host {

constexpr int kLanes = 32;
constexpr int kLargestSharedMemory = 101376;  // bytes; what a block may have on every GPU from sm_80 on
constexpr int kLargestSharedMemoryOfHopper = 232448;

class Hopper;

// When what runs beside the threads takes place, by seed.
enum class Landing { kLate, kAtOnce, kAnyTime };

// A copy that cp.async has begun. `land` carries it out.
struct Copy {
  char* to;
  const char* from;
  int bytes;
  void (*land)(Copy);
};

// What a warp does together, once all of its lanes have come: `arguments` is what each lane gave.
using Collective = void (*)(const void* const* arguments);

class Machine {
 public:
  static Machine& current();  // that of this CPU thread
  Machine();
  ~Machine();

  // Runs a kernel. Throws std::runtime_error with one sentence that names block and thread if it does what CUDA
  // forbids.
  // cluster: blocks of a cluster; 0: the kernel is not one for Hopper.
  void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel, int cluster = 0);

  // Called by the threads of a block.
  int thread() const { return thread_ % threads_; }
  int64_t block() const { return first_block_ + rank(); }
  int rank() const { return thread_ / threads_; }  // of the block in its cluster
  char* shared() const { return shared_of(rank()); }
  void barrier();
  void collective(const char* name, Collective function, const void* arguments);
  void begin_copy(const Copy& copy);
  void commit_copies();
  void wait_for_copies(size_t pending_groups);
  void check_aligned(const char* name, const void* address, size_t alignment);
  void wait_until(const char* name, const std::function<bool()>& condition);
  [[noreturn]] void fail(const std::string& what);

  // For hopper.cpp.
  Hopper& hopper() { return *hopper_; }
  int thread_of_cluster() const { return thread_; }
  char* shared_of(int rank) const { return shared_[static_cast<size_t>(rank)]; }
  int shared_bytes() const { return shared_bytes_; }
  int threads_of_block() const { return threads_; }
  int blocks_of_cluster() const { return static_cast<int>(shared_.size()); }
  Landing landing() const;
  std::mt19937& random() { return random_; }
  void note(const std::string& what);  // stops the kernel where no thread runs that could fail

 private:
  struct Fiber;
  struct Warp;

  static void enter();
  void run_cluster();
  void start(Fiber& fiber);
  void resume(int thread);
  void suspend();
  bool run_warp(int warp);
  void run_collective(int warp);
  bool open_barrier();
  void land(Fiber& fiber, size_t count);
  bool is_ready(const Fiber& fiber) const;
  void explain_deadlock();

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<char*> memories_;  // kept until the launch ends: shared memory of its blocks
  const std::function<void()>* kernel_ = nullptr;
  void* scheduler_ = nullptr;  // stack pointer
  std::vector<char*> shared_;  // of every block of the cluster
  std::unique_ptr<Hopper> hopper_;
  int64_t first_block_ = 0;
  int thread_ = 0;   // of the cluster
  int threads_ = 1;  // of a block
  int shared_bytes_ = 0, running_ = 0;
  std::string failure_;
  std::mt19937 random_;
  unsigned seed_ = 0;

  // For the sanitizers.
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  void* scheduler_fake_stack_ = nullptr;
  void* scheduler_tsan_fiber_ = nullptr;
  char begin_ = 0, end_ = 0, barriers_[2] = {};  // their addresses stand for what orders accesses
  unsigned barrier_count_ = 0;
};

// Seed of the order in which blocks, warps and lanes run and copies land. 0, or what DANET_CUDA_HOST_SEED says: in
// order, and copies land as late as they may.
void set_seed(unsigned seed);

}  // namespace danet::cuda_host
