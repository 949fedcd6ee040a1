// Work sharing among ATen's threads such that results do not depend on their number.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace danet {

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

// Runs worker(queue) on every thread; workers allocate their scratch after the first successful queue.next().
// The region is opened over all threads even for one task: parallel_for would run a single range inline, where the GEMMs
// inside would use the whole team and round differently. Each task must write memory of its own, in an order of its own.
template <class Worker>
void run_tasks(int64_t count, const Worker& worker) {
  if (count == 0) return;
  TaskQueue queue(count);
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) worker(queue);
  });
}

}  // namespace danet
