// Goes through every order in which the events of csrc/cuda/sm90/channel_attention_schedule.h can take place, whose
// functions the kernels run:
//
//     channel_schedule positions STEPS
//     channel_schedule channels FORMED_STEPS STORED_STEPS
//
// A block has three agents: the loader and two warpgroups that multiply. What they do is written down by running the
// schedule. Then all states that can be reached are visited: how far each agent is, what is in every slot and what is
// on its way there, and the barriers, which end a phase when all arrivals and bytes have come, and of which a wait sees
// nothing but the parity. A copy lands at any time after its load; a product reads its slot at any time between its
// beginning and the wait for it, so the slot must hold the right piece all that while. Exit status 0: no state is
// wrong; 1: the sentence says what is.
//
// One arrival stands for those of the warps of a warpgroup. A sum over positions starts afresh after five steps here.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <unordered_set>
#include <vector>

#include "sm90/channel_attention_schedule.h"

namespace {

using namespace danet;

struct Wrong { std::string what; };

struct ShortSums : ChannelGramSchedule {
  static constexpr int kSumSteps = 5;
};

constexpr int kReaders = ChannelSchedule::kReaders, kLoader = kReaders, kAgents = kReaders + 1;
constexpr int kMostSlots = 8;
constexpr int kArrivals = ChannelSchedule::kArrivals / ChannelSchedule::kReaderWarps;
constexpr uint8_t kNothing = 255, kUnderWay = 254, kResults = 253;  // in a slot; others are numbers of pieces

enum class Kind { kWaitEmpty, kLoad, kWaitFull, kBegin, kFinish, kLeave, kMeet, kCollect, kStore };

struct Action {
  Kind kind;
  int slot = 0;
  int number = 0;        // parity, or piece
  unsigned reading = 0;  // bits of the slots whose products are under way after it
};

// Written down by running the schedule. What concerns a single agent is checked on the way.
struct Loader {
  std::vector<Action>& actions;

  void wait_empty(int slot, int parity) { actions.push_back({Kind::kWaitEmpty, slot, parity}); }
  void load(int slot, int step) { actions.push_back({Kind::kLoad, slot, step}); }
};

struct Reader {
  std::vector<Action>& actions;
  std::vector<unsigned> groups{};  // of products under way: their slots
  int begun = 0, in_sum = 0, fetched = -1, made = -1;

  void add(Kind kind, int slot = 0, int number = 0) {
    unsigned reading = 0;
    for (const unsigned group : groups) reading |= group;
    actions.push_back({kind, slot, number, reading});
  }
  void touch(const char* what) const {
    if (!groups.empty()) throw Wrong{std::string(what) + " of a product that is under way"};
  }
  void wait_full(int slot, int parity) { add(Kind::kWaitFull, slot, parity); }
  void leave(int slot) { add(Kind::kLeave, slot); }
  void begin_product(int slot) {
    if (++in_sum > ShortSums::kSumSteps) throw Wrong{"a sum is too long"};
    groups.push_back(1u << slot);
    add(Kind::kBegin, slot, begun++);
  }
  void begin_formed_product(int slot) {
    if (made != begun) throw Wrong{"the weights of step " + std::to_string(begun) + " have not been made"};
    in_sum = 0;
    begin_product(slot);
  }
  void begin_stored_product(int slot) {
    in_sum = 0;
    begin_product(slot);
  }
  template <int kPending>
  void finish_products() {
    while (groups.size() > static_cast<size_t>(kPending)) groups.erase(groups.begin());
    add(Kind::kFinish);
  }
  void end_sum() {
    touch("takes the sum");
    in_sum = 0;
  }
  void fetch_logits(int step) { fetched = step; }
  void make_weights() {
    touch("writes the weights");
    made = fetched;
  }
  void begin_stored_sum() { touch("scales the sum"); }
  void meet() { add(Kind::kMeet); }
  void collect_results() {
    touch("takes the sum");
    add(Kind::kCollect);
  }
  void store_results() { add(Kind::kStore); }
};

struct BarrierState {
  uint8_t parity = 0, missing, bytes = 0;

  void end_phase(int arrivals) {
    if (missing > 0 || bytes > 0) return;
    missing = static_cast<uint8_t>(arrivals);
    parity ^= 1;
  }
};

struct State {
  std::array<uint8_t, kAgents> done{};         // actions of each agent
  std::array<uint8_t, kMostSlots> held{}, coming{};  // pieces, by slot
  std::array<BarrierState, kMostSlots> full{}, empty{};

  std::string key() const { return {reinterpret_cast<const char*>(this), sizeof(State)}; }
};

class Search {
 public:
  explicit Search(int slots) : slots_(slots) {}
  std::array<std::vector<Action>, kAgents> actions;

  size_t run() {
    State first;
    first.held.fill(kNothing), first.coming.fill(kNothing);
    for (auto& barrier : first.full) barrier.missing = 1;
    for (auto& barrier : first.empty) barrier.missing = kArrivals;
    visit(first);
    while (!waiting_.empty()) {
      const State state = waiting_.back();
      waiting_.pop_back();
      bool stuck = true;
      for (int slot = 0; slot < slots_; ++slot) stuck &= !land(state, slot);
      for (int agent = 0; agent < kAgents; ++agent) stuck &= !act(state, agent);
      stuck &= !meet(state);
      if (stuck && !over(state)) throw Wrong{"deadlock: " + where(state)};
    }
    return seen_.size();
  }

 private:
  const Action* next(const State& state, int agent) const {
    const auto& own = actions[static_cast<size_t>(agent)];
    const size_t done = state.done[static_cast<size_t>(agent)];
    return done < own.size() ? &own[done] : nullptr;
  }
  unsigned reading(const State& state, int agent) const {
    const size_t done = state.done[static_cast<size_t>(agent)];
    return done == 0 ? 0 : actions[static_cast<size_t>(agent)][done - 1].reading;
  }
  bool over(const State& state) const {
    for (int agent = 0; agent < kAgents; ++agent) if (next(state, agent) != nullptr) return false;
    for (const uint8_t piece : state.coming) if (piece != kNothing) return false;
    return true;
  }
  std::string where(const State& state) const {
    std::string text;
    for (int agent = 0; agent < kAgents; ++agent) {
      text += (agent == kLoader ? "the loader" : "warpgroup " + std::to_string(agent)) + " after " +
              std::to_string(state.done[static_cast<size_t>(agent)]) + " actions; ";
    }
    return text;
  }
  [[noreturn]] void fail(const std::string& what, int slot, const State& state) const {
    throw Wrong{what + " slot " + std::to_string(slot) + ": " + where(state)};
  }
  void visit(const State& state) {
    if (seen_.insert(state.key()).second) waiting_.push_back(state);
  }
  void arrive(BarrierState& barrier, int arrivals, int slot, const State& state) const {
    if (barrier.missing == 0) fail("one arrival too many at a barrier of", slot, state);
    --barrier.missing;
    barrier.end_phase(arrivals);
  }

  // A copy lands. Returns whether there was one.
  bool land(const State& state, int slot) {
    const auto s = static_cast<size_t>(slot);
    if (state.coming[s] == kNothing) return false;
    State after = state;
    after.held[s] = state.coming[s];
    after.coming[s] = kNothing;
    --after.full[s].bytes;
    after.full[s].end_phase(1);
    visit(after);
    return true;
  }

  // An agent takes its next action. Returns whether it can.
  bool act(const State& state, int agent) {
    const Action* const action = next(state, agent);
    if (action == nullptr || action->kind == Kind::kMeet) return false;
    const int slot = action->slot;
    const auto s = static_cast<size_t>(slot);
    State after = state;
    ++after.done[static_cast<size_t>(agent)];
    switch (action->kind) {
      case Kind::kWaitEmpty:
        if (state.empty[s].parity == action->number) return false;
        break;
      case Kind::kWaitFull:
        if (state.full[s].parity == action->number) return false;
        break;
      case Kind::kLoad:
        for (int reader = 0; reader < kReaders; ++reader) {
          if (reading(state, reader) >> slot & 1) fail("fills what is being read, in", slot, state);
        }
        if (state.coming[s] != kNothing) fail("fills what is being filled,", slot, state);
        if (state.held[s] == kResults) fail("fills over the results,", slot, state);
        after.held[s] = kUnderWay;
        after.coming[s] = static_cast<uint8_t>(action->number);
        ++after.full[s].bytes;
        arrive(after.full[s], 1, slot, state);
        break;
      case Kind::kBegin:
        if (state.held[s] != action->number) {
          fail("piece " + std::to_string(action->number) + " is to be multiplied and not there, in", slot, state);
        }
        break;
      case Kind::kLeave:
        arrive(after.empty[s], kArrivals, slot, state);
        break;
      case Kind::kCollect:
      case Kind::kStore:
        for (int other = 0; other < slots_; ++other) {
          const auto o = static_cast<size_t>(other);
          if (state.coming[o] != kNothing) fail("results meet a piece on its way to", other, state);
          for (int reader = 0; reader < kReaders; ++reader) {
            if (reading(state, reader) >> other & 1) fail("results over what is being read, in", other, state);
          }
          if (action->kind == Kind::kStore && state.held[o] != kResults) fail("no results in", other, state);
          after.held[o] = kResults;
        }
        break;
      default: break;
    }
    visit(after);
    return true;
  }

  // Both warpgroups go on together.
  bool meet(const State& state) {
    State after = state;
    for (int reader = 0; reader < kReaders; ++reader) {
      const Action* const action = next(state, reader);
      if (action == nullptr || action->kind != Kind::kMeet) return false;
      ++after.done[static_cast<size_t>(reader)];
    }
    visit(after);
    return true;
  }

  int slots_;
  std::unordered_set<std::string> seen_;
  std::vector<State> waiting_;
};

}  // namespace

int main(int count, char** words) {
  const std::string which = count > 1 ? words[1] : "";
  if ((which != "positions" || count != 3) && (which != "channels" || count != 4)) {
    return std::fprintf(stderr, "usage: channel_schedule positions STEPS | channels FORMED STORED\n"), 3;
  }
  const bool positions = which == "positions";
  const int first = std::atoi(words[2]), second = positions ? 0 : std::atoi(words[3]);
  try {
    Search search(positions ? ShortSums::kSlots : ChannelApplySchedule::kSlots);
    Loader loader{search.actions[kLoader]};
    positions ? fill_ring<ShortSums>(loader, first) : fill_ring<ChannelApplySchedule>(loader, first + second);
    for (size_t warpgroup = 0; warpgroup < kReaders; ++warpgroup) {
      Reader reader{search.actions[warpgroup]};
      if (positions) {
        sum_over_positions<ShortSums>(reader, first);
      } else {
        sum_over_channels<ChannelApplySchedule>(reader, first, second);
      }
      reader.touch("ends in the middle");
      if (reader.begun != first + second) throw Wrong{"not all pieces are multiplied"};
    }
    std::printf("%zu states\n", search.run());
  } catch (const Wrong& wrong) {
    std::printf("%s\n", wrong.what.c_str());
    return 1;
  }
  return 0;
}
