// Work sharing among ATen's threads such that results do not depend on their number.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

// MKL, where torch's BLAS is MKL: sets the calling thread's number of threads and returns what it was (0: the common one).
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace danet {

// While it lives, GEMMs of this thread run on one thread. Inside a parallel region MKL runs on one thread anyway, but still
// cuts the product as if for the number of threads it was told, and some cuts (along K) change the rounding.
class SingleThreadedBlas {
 public:
  SingleThreadedBlas() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~SingleThreadedBlas() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  SingleThreadedBlas(const SingleThreadedBlas&) = delete;
  SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;

 private:
  const int before_;
};

// Hands out 0, 1, ..., count - 1, each once, to whichever worker asks first.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}

  // Takes the next task. False when there is none left.
  bool next(int64_t& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

// Runs worker(queue) on every thread; workers allocate their scratch after the first successful queue.next(). Each task must
// write memory of its own, in an order of its own. A single task runs here if BLAS can be told to use one thread; else the
// region is opened over all threads even so, as GEMMs outside of it would use the whole team and round differently.
template <class Worker>
void run_tasks(int64_t count, const Worker& worker) {
  if (count == 0) return;
  TaskQueue queue(count);
  if (count == 1 && MKL_Set_Num_Threads_Local) {
    const SingleThreadedBlas guard;
    worker(queue);
    return;
  }
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const SingleThreadedBlas guard;
    for (int64_t thread = first; thread < last; ++thread) worker(queue);
  });
}

}  // namespace danet
