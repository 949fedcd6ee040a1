// Who does what when in the Hopper kernels of position attention: the roles, the rings of slots in shared memory and
// the phases of their barriers. Plain C++: the kernels run these functions with actions that load and multiply,
// tests/cuda_host/schedule.cpp runs them with actions that it writes down, and proves that no order of events is wrong.
//
// Told for the forward; the gradient of value has keys for queries, queries for keys and dout for values. A cluster of
// two blocks owns 2 x 64 queries. Each block has one thread that loads and two warpgroups that attend, each to half of
// the channels. A piece of keys, or of values for one warpgroup, goes to both blocks: each loads one half of it and
// sends it to both, so a slot may be filled only when its readers in both blocks have left it.
#pragma once

#include "ptx/device.cuh"

namespace danet {

enum class Ring { kQuery, kKey, kValue };

struct PositionForwardSchedule {
  static constexpr int kClusterBlocks = 2;
  static constexpr int kReaders = 2;       // warpgroups of a block that attend
  static constexpr int kReaderWarps = 4;   // of each; every one says for itself that it has left a slot
  static constexpr int kKeySlots = 2;      // keys of one step
  static constexpr int kValueSlots = 6;    // half of the values of one step
  static constexpr int kWeightSlots = 2;
  // Arrivals that end a phase of the barrier that says a slot is empty. That it is full takes one, of the own loader,
  // and the bytes from both blocks.
  static constexpr int kKeyArrivals = kClusterBlocks * kReaders * kReaderWarps;
  static constexpr int kValueArrivals = kClusterBlocks * kReaderWarps;  // only one warpgroup reads a piece
};

// Where the piece with this number goes, and the parity of the phase of the slot's barriers that is its own.
struct Place {
  int slot;
  int parity;
};
DANET_DEVICE Place key_place(int step) {
  return {step % PositionForwardSchedule::kKeySlots, step / PositionForwardSchedule::kKeySlots % 2};
}
DANET_DEVICE Place value_place(int step, int warpgroup) {
  const int piece = PositionForwardSchedule::kReaders * step + warpgroup;
  return {piece % PositionForwardSchedule::kValueSlots, piece / PositionForwardSchedule::kValueSlots % 2};
}
DANET_DEVICE int weight_slot(int step) { return step % PositionForwardSchedule::kWeightSlots; }

// The loader. A slot's first filling waits for the phase before the first, which counts as over.
template <class Actions>
DANET_DEVICE void load_pieces(Actions& act, int steps) {
  const auto load = [&](Ring ring, Place place, int piece) {
    act.wait_empty(ring, place.slot, place.parity ^ 1);
    act.load(ring, place.slot, piece);
  };
  if (steps == 0) return;
  act.load(Ring::kQuery, 0, 0);
  load(Ring::kKey, key_place(0), 0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(Ring::kKey, key_place(step + 1), step + 1);
    for (int warpgroup = 0; warpgroup < PositionForwardSchedule::kReaders; ++warpgroup) {
      load(Ring::kValue, value_place(step, warpgroup), PositionForwardSchedule::kReaders * step + warpgroup);
    }
  }
}

// The steps of a warpgroup that attends, at least one. While the products with the values of one step run, it makes the
// weights of the next: the logits of half of the keys, a maximum together with the other warpgroup, and weights that
// both read.
template <class Actions>
DANET_DEVICE void add_steps(Actions& act, int steps, int warpgroup) {
  const auto wait_key = [&](int step) { act.wait_full(Ring::kKey, key_place(step).slot, key_place(step).parity); };
  const auto wait_value = [&](Place value) { act.wait_full(Ring::kValue, value.slot, value.parity); };

  // 1. Queries to registers. Their memory is that of the last weight slot, which is first written after all have met.
  act.wait_full(Ring::kQuery, 0, 0);
  act.take_queries(PositionForwardSchedule::kWeightSlots - 1);

  // 2. Weights of the first step.
  wait_key(0);
  act.begin_logits(key_place(0).slot);
  act.template finish_products<0>();
  act.leave(Ring::kKey, key_place(0).slot);
  act.share_maximum();
  act.meet();
  act.weigh(weight_slot(0));
  act.meet();
  if (steps > 1) wait_key(1);

  for (int step = 0; step + 1 < steps; ++step) {
    // 3. Logits of the next step, and behind them the sum of this one. It belongs to the maximum of the step before,
    // and is rescaled while the logits are made.
    const Place key = key_place(step + 1), value = value_place(step, warpgroup);
    act.begin_logits(key.slot);
    wait_value(value);
    act.rescale();
    act.begin_sum(weight_slot(step), value.slot);

    // 4. Weights of the next step, while the sum runs.
    act.template finish_products<1>();
    act.leave(Ring::kKey, key.slot);
    act.share_maximum();
    act.meet();
    act.weigh(weight_slot(step + 1));
    act.meet();
    if (step + 2 < steps) wait_key(step + 2);

    // 5. The sum is ready.
    act.template finish_products<0>();
    act.leave(Ring::kValue, value.slot);
  }

  // 6. The sum of the last step.
  const Place value = value_place(steps - 1, warpgroup);
  wait_value(value);
  act.rescale();
  act.begin_sum(weight_slot(steps - 1), value.slot);
  act.template finish_products<0>();
}

// A warpgroup that attends.
template <class Actions>
DANET_DEVICE void attend(Actions& act, int steps, int warpgroup) {
  if (steps > 0) add_steps(act, steps, warpgroup);

  // The results go through the memory of the values, which nobody reads any more once all have met.
  act.share_sums();
  act.meet();
  act.collect_results();
  act.meet();
  act.store_results();
}

}  // namespace danet
