#include "machine.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "fiber_switch.h"
#include "hopper.h"
#include "sanitizers.h"

namespace danet::cuda_host {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMostCopies = 1024;  // under way in one thread; its list must not grow while threads run

struct Abandoned {};  // thrown through a fiber that has failed

std::atomic<unsigned>& seed() {
  static std::atomic<unsigned> value = [] {
    const char* text = std::getenv("DANET_CUDA_HOST_SEED");
    return text == nullptr ? 0u : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
  }();
  return value;
}

}  // namespace

enum class State { kReady, kAtCollective, kAtBarrier, kWaiting, kDone };

struct Machine::Fiber {
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;   // AddressSanitizer's
  void* tsan_fiber = nullptr;
  State state = State::kDone;
  const void* arguments = nullptr;  // of the collective that it waits at
  const char* name = nullptr;       // of what it waits for, until `condition` holds
  const std::function<bool()>* condition = nullptr;
  std::vector<Copy> copies;         // begun since none was under way, oldest first
  size_t landed = 0;                // how many of them have landed
  std::vector<size_t> groups;       // how many had begun when each group was committed
};

struct Machine::Warp {
  int arrived = 0;
  const char* name = nullptr;
  Collective function = nullptr;
};

void set_seed(unsigned value) { seed() = value; }

Machine& Machine::current() {
  static thread_local Machine machine;
  return machine;
}

Machine::Machine() = default;

Machine::~Machine() {
  if (kFindsRaces) return;  // then the stacks are gone with the launch
  for (Fiber& fiber : fibers_) std::free(fiber.stack);
}

Landing Machine::landing() const { return static_cast<Landing>(seed_ % 3); }

void Machine::run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel, int cluster) {
  const int most = cluster == 0 ? kLargestSharedMemory : kLargestSharedMemoryOfHopper;
  if (shared_bytes > most) {
    throw std::runtime_error("cuda_host: expected at most " + std::to_string(most) + " bytes of shared memory, got " +
                             std::to_string(shared_bytes));
  }
  if (threads % kLanes != 0) {
    throw std::runtime_error("cuda_host: expected whole warps, got " + std::to_string(threads) + " threads");
  }
  if (cluster != 0 && blocks % cluster != 0) {
    throw std::runtime_error("cuda_host: expected whole clusters of " + std::to_string(cluster) + ", got " +
                             std::to_string(blocks) + " blocks");
  }
  kernel_ = &kernel;
  threads_ = threads;
  const int together = std::max(cluster, 1);
  shared_.assign(static_cast<size_t>(together), nullptr);
  shared_bytes_ = shared_bytes;
  failure_.clear();
  seed_ = seed();
  random_.seed(seed_);
  while (static_cast<int>(fibers_.size()) < together * threads) {
    fibers_.emplace_back();
    fibers_.back().copies.reserve(kMostCopies);
    fibers_.back().groups.reserve(kMostCopies);
    if (!kFindsRaces) fibers_.back().stack = static_cast<char*>(std::malloc(kStackBytes));
  }
  warps_.assign(static_cast<size_t>(together * threads / kLanes), {});
  scheduler_tsan_fiber_ = current_fiber();
  release(&begin_);

  std::vector<int64_t> order(static_cast<size_t>(blocks / together));
  std::iota(order.begin(), order.end(), 0);
  if (seed_ != 0) std::shuffle(order.begin(), order.end(), random_);
  for (const int64_t number : order) {
    first_block_ = number * together;
    if (cluster != 0) hopper_ = std::make_unique<Hopper>(*this);
    run_cluster();
    if (!failure_.empty()) break;
  }
  hopper_.reset();

  // Only now: what one block does is not ordered before what the next one does.
  acquire(&end_);
  for (char* memory : memories_) std::free(memory);
  memories_.clear();
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

void Machine::run_cluster() {
  // Aligned to 128 bytes and no more, and of the exact size, so that AddressSanitizer sees the first byte behind it.
  constexpr size_t kAlignment = 128, kUnaligned = 1024;
  for (char*& shared : shared_) {
    char* memory = nullptr;
    const size_t bytes = kAlignment + static_cast<size_t>(shared_bytes_);
    if (posix_memalign(reinterpret_cast<void**>(&memory), kUnaligned, bytes) != 0) throw std::bad_alloc();
    memories_.push_back(memory);
    shared = memory + kAlignment;
    std::memset(shared, 0xff, static_cast<size_t>(shared_bytes_));  // NaN in every floating type
  }
  for (Warp& warp : warps_) warp = {};
  running_ = static_cast<int>(shared_.size()) * threads_;
  for (int thread = 0; thread < running_; ++thread) start(fibers_[static_cast<size_t>(thread)]);

  std::vector<int> order(warps_.size());
  std::iota(order.begin(), order.end(), 0);
  while (running_ > 0 && failure_.empty()) {
    bool progress = false;
    if (seed_ != 0) std::shuffle(order.begin(), order.end(), random_);
    for (const int warp : order) {
      // How far a warp runs ahead of the others: as far as it can, or a random way.
      for (unsigned left = seed_ == 0 ? ~0u : 1u << random_() % 12; left > 0 && failure_.empty(); --left) {
        if (!run_warp(warp)) break;
        progress = true;
      }
    }
    progress |= open_barrier();
    if (hopper_ != nullptr) progress |= hopper_->go_on(!progress);
    if (!progress && failure_.empty() && running_ > 0) explain_deadlock();
  }
}

// Let every lane of a warp that can go on do so until it waits, then what they may have come together for.
bool Machine::run_warp(int warp) {
  int lanes[kLanes];
  std::iota(lanes, lanes + kLanes, warp * kLanes);
  if (seed_ != 0) std::shuffle(lanes, lanes + kLanes, random_);
  bool ran = false;
  for (const int thread : lanes) {
    if (!is_ready(fibers_[static_cast<size_t>(thread)])) continue;
    resume(thread);
    ran = true;
    if (!failure_.empty()) return true;
  }
  if (warps_[static_cast<size_t>(warp)].arrived == kLanes) {
    run_collective(warp);
    return true;
  }
  return ran;
}

bool Machine::is_ready(const Fiber& fiber) const {
  return fiber.state == State::kReady || (fiber.state == State::kWaiting && (*fiber.condition)());
}

void Machine::run_collective(int warp) {
  Warp& state = warps_[static_cast<size_t>(warp)];
  const void* arguments[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    Fiber& fiber = fibers_[static_cast<size_t>(warp * kLanes + lane)];
    arguments[lane] = fiber.arguments;
    fiber.state = State::kReady;
  }
  state.arrived = 0;
  state.function(arguments);
}

bool Machine::open_barrier() {
  const auto waits = [](const Fiber& fiber) { return fiber.state == State::kAtBarrier; };
  const auto end = fibers_.begin() + threads_;
  const auto waiting = std::count_if(fibers_.begin(), end, waits);
  if (waiting == 0 || waiting != running_) return false;
  if (running_ != threads_) {
    thread_ = static_cast<int>(std::find_if(fibers_.begin(), end, waits) - fibers_.begin());
    note("waits at a barrier that " + std::to_string(threads_ - running_) + " threads have left without");
    return true;
  }
  for (auto fiber = fibers_.begin(); fiber != end; ++fiber) fiber->state = State::kReady;
  ++barrier_count_;
  return true;
}

void Machine::explain_deadlock() {
  const int threads = static_cast<int>(shared_.size()) * threads_;
  for (thread_ = 0; thread_ < threads; ++thread_) {
    if (fibers_[static_cast<size_t>(thread_)].state != State::kAtCollective) continue;
    const Warp& warp = warps_[static_cast<size_t>(thread_ / kLanes)];
    return note(std::string("waits at ") + warp.name + " for " + std::to_string(kLanes - warp.arrived) +
                " lanes of its warp that do not come");
  }
  for (thread_ = 0; thread_ < threads; ++thread_) {
    const Fiber& fiber = fibers_[static_cast<size_t>(thread_)];
    if (fiber.state == State::kWaiting) return note(std::string("waits for ") + fiber.name + " that never comes");
  }
}

void Machine::start(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.fake_stack = nullptr;
  fiber.copies.clear();
  fiber.groups.clear();
  fiber.landed = 0;
  if (kFindsRaces) {  // blocks are not ordered, so the threads of two must not share a stack
    fiber.stack = static_cast<char*>(std::malloc(kStackBytes));
    memories_.push_back(fiber.stack);
  }
  fiber.stack_pointer = new_stack(fiber.stack, kStackBytes, &Machine::enter);
  if (fiber.tsan_fiber != nullptr) destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = create_fiber();
}

void Machine::enter() {
  Machine& machine = current();
  enter_stack(nullptr, &machine.scheduler_stack_, &machine.scheduler_stack_bytes_);
  acquire(&machine.begin_);
  try {
    (*machine.kernel_)();
    const Fiber& fiber = machine.fibers_[static_cast<size_t>(machine.thread_)];
    if (fiber.landed != fiber.copies.size()) machine.note("ends with copies under way that nobody waits for");
  } catch (const Abandoned&) {
  }
  release(&machine.end_);
  machine.fibers_[static_cast<size_t>(machine.thread_)].state = State::kDone;
  --machine.running_;
  machine.suspend();
}

void Machine::resume(int thread) {
  thread_ = thread;
  Fiber& fiber = fibers_[static_cast<size_t>(thread)];
  fiber.state = State::kReady;
  switch_fiber(fiber.tsan_fiber);
  leave_stack(&scheduler_fake_stack_, fiber.stack, kStackBytes);
  danet_switch_stack(&scheduler_, fiber.stack_pointer);
  enter_stack(scheduler_fake_stack_, nullptr, nullptr);
}

void Machine::suspend() {
  Fiber& fiber = fibers_[static_cast<size_t>(thread_)];
  if (fiber.state != State::kDone && landing() == Landing::kAnyTime) {
    land(fiber, fiber.landed + random_() % (fiber.copies.size() - fiber.landed + 1));
  }
  switch_fiber(scheduler_tsan_fiber_);
  leave_stack(fiber.state == State::kDone ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
  danet_switch_stack(&fiber.stack_pointer, scheduler_);
  enter_stack(fiber.fake_stack, nullptr, nullptr);
}

void Machine::barrier() {
  // Two, as some may be at the next one while others leave this one.
  char* const event = &barriers_[barrier_count_ % 2];
  release(event);
  fibers_[static_cast<size_t>(thread_)].state = State::kAtBarrier;
  suspend();
  acquire(event);
}

void Machine::wait_until(const char* name, const std::function<bool()>& condition) {
  Fiber& fiber = fibers_[static_cast<size_t>(thread_)];
  fiber.name = name;
  fiber.condition = &condition;
  fiber.state = State::kWaiting;
  suspend();
}

void Machine::collective(const char* name, Collective function, const void* arguments) {
  Warp& warp = warps_[static_cast<size_t>(thread_ / kLanes)];
  if (warp.arrived == 0) {
    warp.name = name;
    warp.function = function;
  } else if (warp.function != function) {
    fail(std::string("is at ") + name + " while other lanes of its warp are at " + warp.name);
  }
  ++warp.arrived;
  Fiber& fiber = fibers_[static_cast<size_t>(thread_)];
  fiber.arguments = arguments;
  fiber.state = State::kAtCollective;
  suspend();
}

void Machine::begin_copy(const Copy& copy) {
  check_aligned("cp.async", copy.to, 16);
  check_aligned("cp.async", copy.from, 16);
  if (copy.bytes < 0 || copy.bytes > 16) fail("copies " + std::to_string(copy.bytes) + " bytes of 16");
  if (copy.to < shared() || copy.to + 16 > shared() + shared_bytes_) fail("copies to outside of shared memory");
  Fiber& fiber = fibers_[static_cast<size_t>(thread_)];
  if (fiber.landed == fiber.copies.size() && fiber.groups.empty()) {
    fiber.copies.clear();
    fiber.landed = 0;
  }
  if (fiber.copies.size() == kMostCopies) fail("has more than " + std::to_string(kMostCopies) + " copies under way");
  fiber.copies.push_back(copy);
  if (landing() == Landing::kAtOnce) land(fiber, fiber.copies.size());
}

void Machine::commit_copies() {
  Fiber& fiber = fibers_[static_cast<size_t>(thread_)];
  fiber.groups.push_back(fiber.copies.size());
}

void Machine::wait_for_copies(size_t pending_groups) {
  Fiber& fiber = fibers_[static_cast<size_t>(thread_)];
  if (fiber.groups.size() <= pending_groups) return;
  land(fiber, fiber.groups[fiber.groups.size() - pending_groups - 1]);
  if (pending_groups == 0) fiber.groups.clear();
}

// Every copy up to the one with number `count`.
void Machine::land(Fiber& fiber, size_t count) {
  for (; fiber.landed < count; ++fiber.landed) fiber.copies[fiber.landed].land(fiber.copies[fiber.landed]);
}

void Machine::check_aligned(const char* name, const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(std::string("gives ") + name + " an address that is no multiple of " + std::to_string(alignment));
  }
}

void Machine::note(const std::string& what) {
  if (failure_.empty()) {
    failure_ = "cuda_host: block " + std::to_string(block()) + ", thread " + std::to_string(thread()) + " " + what;
  }
}

void Machine::fail(const std::string& what) {
  note(what);
  throw Abandoned();
}

}  // namespace danet::cuda_host
