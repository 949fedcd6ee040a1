// Who does what when in the products of channel attention on Hopper: the roles, the ring of slots in shared memory and
// the phases of its barriers. Plain C++, as position_attention_schedule.h: the kernels run these functions with actions
// that load and multiply, tests/cuda_host/channel_schedule.cpp runs them with actions that it writes down, and goes
// through every order in which they can take place.
//
// A block has one thread that loads and two warpgroups that multiply, each half of the rows of the result. Both read
// every piece, which is a step of the sum; a slot may be filled anew when all of their warps have left it.
#pragma once

#include "ptx/device.cuh"

namespace danet {

struct ChannelSchedule {
  static constexpr int kReaders = 2;      // warpgroups that multiply
  static constexpr int kReaderWarps = 4;  // of each; every one says for itself that it has left a slot
  // Arrivals that end a phase of the barrier that says a slot is empty. That it is full takes one, of the loader, and
  // the bytes.
  static constexpr int kArrivals = kReaders * kReaderWarps;
};

// Sums over positions: G = x x^T, H = dout x^T.
struct ChannelGramSchedule : ChannelSchedule {
  static constexpr int kSlots = 6;
  static constexpr int kPositions = 64;  // of a step
  // Tensor cores do not round as they add: the error grows with the number of terms. After so many a sum starts afresh.
  static constexpr int kLongestSum = 2048;  // positions
  static constexpr int kSumSteps = kLongestSum / kPositions;
  static_assert(kLongestSum % kPositions == 0, "a sum is whole steps");
};

// Sums over channels: P x, P^T dout, (dG + dG^T) x.
struct ChannelApplySchedule : ChannelSchedule {
  static constexpr int kSlots = 4;
  static constexpr int kChannels = 64;  // of a step
};

// Where the piece of this step goes, and the parity of the phase of the slot's barriers that is its own.
struct RingPlace {
  int slot;
  int parity;
};
template <class Schedule>
DANET_DEVICE RingPlace ring_place(int step) {
  return {step % Schedule::kSlots, step / Schedule::kSlots % 2};
}

// The loader. A slot's first filling waits for the phase before the first, which counts as over.
template <class Schedule, class Actions>
DANET_DEVICE void fill_ring(Actions& act, int steps) {
  for (int step = 0; step < steps; ++step) {
    const RingPlace place = ring_place<Schedule>(step);
    act.wait_empty(place.slot, place.parity ^ 1);
    act.load(place.slot, step);
  }
}

// A warpgroup that sums over positions. The product of one step is under way while that of the next begins.
template <class Schedule, class Actions>
DANET_DEVICE void sum_over_positions(Actions& act, int steps) {
  const auto begin = [&](int step) {
    const RingPlace place = ring_place<Schedule>(step);
    act.wait_full(place.slot, place.parity);
    act.begin_product(place.slot);
  };
  for (int first = 0; first < steps; first += Schedule::kSumSteps) {
    const int end = steps - first < Schedule::kSumSteps ? steps : first + Schedule::kSumSteps;
    begin(first);
    for (int step = first + 1; step < end; ++step) {
      begin(step);
      act.template finish_products<1>();
      act.leave(ring_place<Schedule>(step - 1).slot);
    }
    act.template finish_products<0>();
    act.leave(ring_place<Schedule>(end - 1).slot);
    act.end_sum();
  }
}

// A warpgroup that sums over channels, first `formed_steps` with weights that it makes from logits, then `stored_steps`
// with weights that come beside the values.
template <class Schedule, class Actions>
DANET_DEVICE void sum_over_channels(Actions& act, int formed_steps, int stored_steps) {
  // 1. A product reads its weights from registers, so those of the next step are made when it is over: in the time of
  // the other warpgroup's product. The logits are fetched while it runs.
  if (formed_steps > 0) {
    act.fetch_logits(0);
    act.make_weights();
  }
  for (int step = 0; step < formed_steps; ++step) {
    const RingPlace place = ring_place<Schedule>(step);
    act.wait_full(place.slot, place.parity);
    act.begin_formed_product(place.slot);
    if (step + 1 < formed_steps) act.fetch_logits(step + 1);
    act.template finish_products<0>();
    act.leave(place.slot);
    if (step + 1 < formed_steps) act.make_weights();
  }

  // 2. Stored weights: one product is under way while the next begins.
  if (stored_steps > 0) {
    const auto begin = [&](int step) {
      const RingPlace place = ring_place<Schedule>(step);
      act.wait_full(place.slot, place.parity);
      act.begin_stored_product(place.slot);
    };
    act.begin_stored_sum();
    begin(formed_steps);
    for (int step = formed_steps + 1; step < formed_steps + stored_steps; ++step) {
      begin(step);
      act.template finish_products<1>();
      act.leave(ring_place<Schedule>(step - 1).slot);
    }
    act.template finish_products<0>();
  }

  // 3. The results go through the memory of the ring, which nobody reads any more once both have met.
  act.meet();
  act.collect_results();
  act.meet();
  act.store_results();
}

}  // namespace danet
