// One multiprocessor, as far as CUDA C++ can tell, on one CPU thread: the threads of a block are fibers, blocks run one
// after another. The headers in ptx/ put the kernels' functions on top of it.
//
// What it finds: wrong values, addresses outside of shared memory or not aligned, collectives that only some lanes of a
// warp reach, barriers that only some threads reach, copies that nobody waits for, and under ThreadSanitizer accesses
// that nothing orders. What it cannot see: hardware that reorders memory accesses within what the barriers allow, the
// async proxy of Hopper, and how tensor cores round as they add.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace danet::cuda_host {

constexpr int kLanes = 32;
constexpr int kLargestSharedMemory = 101376;  // bytes; what a block may have on every GPU from sm_80 on

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
  void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

  // Called by the threads of a block.
  int thread() const { return thread_; }
  int64_t block() const { return block_; }
  char* shared() const { return shared_; }
  void barrier();
  void collective(const char* name, Collective function, const void* arguments);
  void begin_copy(const Copy& copy);
  void commit_copies();
  void wait_for_copies(size_t pending_groups);
  void check_aligned(const char* name, const void* address, size_t alignment);

 private:
  struct Fiber;
  struct Warp;

  static void enter();
  void run_block();
  void start(Fiber& fiber);
  void resume(int thread);
  void suspend();
  bool run_warp(int warp);
  void run_collective(int warp);
  bool open_barrier();
  void land(Fiber& fiber, size_t count);
  [[noreturn]] void fail(const std::string& what);
  void note(const std::string& what);
  void explain_deadlock();

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<char*> memories_;  // kept until the launch ends: shared memory of its blocks
  const std::function<void()>* kernel_ = nullptr;
  void* scheduler_ = nullptr;  // stack pointer
  char* shared_ = nullptr;
  int64_t block_ = 0;
  int thread_ = 0, threads_ = 0, shared_bytes_ = 0, running_ = 0;
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
