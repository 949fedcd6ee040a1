// Proves that no order of events is wrong in csrc/cuda/sm90/position_attention_schedule.h, whose functions the kernel
// runs:
//
//     schedule STEPS
//
// A cluster has six agents: in each of its two blocks a loader and two warpgroups. What they do is written down by
// running the schedule, and becomes a graph: an event comes before the next one of its agent; a load before its copies
// land, in each block apart; what a phase of a barrier waits for before the end of that phase, and that before those
// that wait for it; a product's beginning before its end. The n-th arrival of an agent, or bytes of a copy, are meant
// for the n-th phase. That hardware can do nothing else follows, event by event, if in this graph
//
// - there is no cycle, and every phase that somebody waits for gets all of its arrivals and bytes (else: deadlock);
// - nothing counts for a phase before the phase before it is over;
// - who waits comes to it after the end of the phase before, and goes on before the end of the phase after, since parity
//   tells no more than that.
//
// Then the order of two events in the graph is their order in every run, and one where there is none is chance. So, of
// every slot: what is read has been written in full, and whatever else is written there comes before that, or after the
// end of the read. Exit status 0: so it is; 1: the sentence says what is not.
//
// One arrival stands for those of the warps of a warpgroup.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "sm90/position_attention_schedule.h"

namespace {

using namespace danet;
using Schedule = PositionForwardSchedule;

constexpr int kBlocks = Schedule::kClusterBlocks, kReaders = Schedule::kReaders;

struct Wrong { std::string what; };

// A slot or a barrier of a block. The query's memory is that of the last weights.
enum class Kind { kWeights, kKeys, kValues, kQueryFull, kKeysFull, kKeysEmpty, kValuesFull, kValuesEmpty };
struct Place {
  Kind kind;
  int slot, block;
  auto operator<=>(const Place&) const = default;
  std::string name() const {
    constexpr const char* kNames[] = {"weights",       "keys",       "values",      "full queries", "full keys",
                                      "empty keys", "full values", "empty values"};
    return std::string(kNames[static_cast<int>(kind)]) + " " + std::to_string(slot) + " of block " +
           std::to_string(block);
  }
};

struct Access {
  int begin, end;    // events
  int piece;
  bool writes;
  int half;          // of the slot, that is written
};

struct Count {       // what counts for a phase: an arrival, or a half that has come
  int event;
  bool bytes;
};

class Graph {
 public:
  int event(int before = -1) {
    edges_.emplace_back();
    if (before >= 0) order(before, static_cast<int>(edges_.size()) - 1);
    return static_cast<int>(edges_.size()) - 1;
  }
  void order(int before, int after) { edges_[static_cast<size_t>(before)].push_back(after); }

  // Everything that comes after an event, for all events; it must be called before `comes_before`.
  void close() {
    const size_t count = edges_.size(), words = (count + 63) / 64;
    std::vector<int> missing(count, 0), ready, sorted;
    for (const auto& after : edges_) for (const int event : after) ++missing[static_cast<size_t>(event)];
    for (size_t i = 0; i < count; ++i) if (missing[i] == 0) ready.push_back(static_cast<int>(i));
    while (!ready.empty()) {
      sorted.push_back(ready.back());
      ready.pop_back();
      for (const int event : edges_[static_cast<size_t>(sorted.back())]) {
        if (--missing[static_cast<size_t>(event)] == 0) ready.push_back(event);
      }
    }
    if (sorted.size() != count) throw Wrong{"deadlock: events wait for each other in a circle"};
    after_.assign(count, std::vector<uint64_t>(words, 0));
    for (auto event = sorted.rbegin(); event != sorted.rend(); ++event) {
      auto& own = after_[static_cast<size_t>(*event)];
      own[static_cast<size_t>(*event) / 64] |= uint64_t{1} << *event % 64;
      for (const int next : edges_[static_cast<size_t>(*event)]) {
        for (size_t word = 0; word < words; ++word) own[word] |= after_[static_cast<size_t>(next)][word];
      }
    }
  }
  bool comes_before(int first, int second) const {
    return after_[static_cast<size_t>(first)][static_cast<size_t>(second) / 64] >> second % 64 & 1;
  }
  size_t size() const { return edges_.size(); }

 private:
  std::vector<std::vector<int>> edges_;
  std::vector<std::vector<uint64_t>> after_;
};

struct Wait {
  int event, before;  // and the event of its agent before it
  int phase;
};

// What all agents have in common.
struct Cluster {
  Graph graph;
  std::map<Place, std::map<int, std::vector<Count>>> counts;     // by barrier and phase
  std::map<std::pair<Place, int>, int> counted;                  // so far, by barrier and who counts
  std::map<Place, std::map<int, int>> ends;                      // the event that a phase is over
  std::map<Place, std::vector<Wait>> waits;
  std::map<Place, std::vector<Access>> accesses;                 // by slot
  std::map<std::pair<int, int>, std::vector<int>> meetings;      // by block and number

  void count(const Place& barrier, int who, int event, bool bytes) {
    const int phase = counted[{barrier, 2 * who + bytes}]++;
    counts[barrier][phase].push_back({event, bytes});
  }
};

int expected_arrivals(Kind barrier) {
  switch (barrier) {
    case Kind::kKeysEmpty: return Schedule::kKeyArrivals / Schedule::kReaderWarps;
    case Kind::kValuesEmpty: return Schedule::kValueArrivals / Schedule::kReaderWarps;
    default: return 1;
  }
}
int expected_halves(Kind barrier) {
  return barrier == Kind::kKeysEmpty || barrier == Kind::kValuesEmpty ? 0 : kBlocks;
}

struct Agent {
  Cluster& cluster;
  int block, number;
  int last;  // event
  std::map<Place, int> waited{};

  Agent(Cluster& c, int own_block, int own_number)
      : cluster(c), block(own_block), number(own_number), last(c.graph.event()) {}

  int next() { return last = cluster.graph.event(last); }
  Place slot_of(Ring ring, int slot) const {
    if (ring == Ring::kQuery) return {Kind::kWeights, Schedule::kWeightSlots - 1, block};
    return {ring == Ring::kKey ? Kind::kKeys : Kind::kValues, slot, block};
  }
  static Place full(Ring ring, int slot, int of_block) {
    return {ring == Ring::kQuery ? Kind::kQueryFull : ring == Ring::kKey ? Kind::kKeysFull : Kind::kValuesFull, slot,
            of_block};
  }
  static Place empty(Ring ring, int slot, int of_block) {
    return {ring == Ring::kKey ? Kind::kKeysEmpty : Kind::kValuesEmpty, slot, of_block};
  }
  // `first`: the phase that the agent's first wait at this barrier is for; the others follow one by one.
  void wait(const Place& barrier, int parity, int first) {
    const int phase = first + waited[barrier]++;
    if ((phase + 2) % 2 != parity) throw Wrong{"waits for the wrong parity of " + barrier.name()};
    const int before = last;
    cluster.waits[barrier].push_back({next(), before, phase});
  }
  void access(const Place& slot, int begin, int end, int piece, bool writes, int half) {
    cluster.accesses[slot].push_back({begin, end, piece, writes, half});
  }
};

constexpr int kQueryPiece = -1, kResultPiece = -2;  // others are numbers of steps or pieces

struct Loader : Agent {
  using Agent::Agent;
  void wait_empty(Ring ring, int slot, int parity) { wait(empty(ring, slot, block), parity, -1); }
  void load(Ring ring, int slot, int piece) {
    cluster.count(full(ring, slot, block), number, next(), false);
    const int begin = next();
    for (int to = 0; to < kBlocks; ++to) {
      for (int half = 0; half < kBlocks; ++half) {
        const bool own = ring == Ring::kQuery ? to == block : half == block;  // queries are for the own block alone
        if (!own) continue;
        const int lands = cluster.graph.event(begin);
        Place place = slot_of(ring, slot);
        place.block = to;
        access(place, begin, lands, ring == Ring::kQuery ? kQueryPiece : piece, true, half);
        cluster.count(full(ring, slot, to), ring == Ring::kQuery ? half : number, lands, true);
      }
    }
  }
};

// Which piece a warpgroup reads follows from what it is for: the n-th logits are made from the n-th keys, and so on.
struct Reader : Agent {
  int warpgroup, logits = 0, sums = 0, weighed = 0, met = 0;
  std::vector<std::vector<std::pair<Place, size_t>>> groups{};  // of products under way: their accesses

  Reader(Cluster& c, int own_block, int own_number, int own_warpgroup)
      : Agent(c, own_block, own_number), warpgroup(own_warpgroup) {}

  void wait_full(Ring ring, int slot, int parity) { wait(full(ring, slot, block), parity, 0); }
  void take_queries(int slot) {
    const int event = next();
    access({Kind::kWeights, slot, block}, event, event, kQueryPiece, false, 0);
  }
  void leave(Ring ring, int slot) {
    for (int rank = 0; rank < kBlocks; ++rank) cluster.count(empty(ring, slot, rank), number, next(), false);
  }
  void meet() {
    const int event = next();
    cluster.meetings[{block, met++}].push_back(event);
    next();  // after the meeting
  }
  void read(const Place& slot, int piece) {
    access(slot, next(), -1, piece, false, 0);
    groups.back().emplace_back(slot, cluster.accesses[slot].size() - 1);
  }
  void begin_logits(int slot) {
    groups.emplace_back();
    read({Kind::kKeys, slot, block}, logits++);
  }
  void begin_sum(int weight_slot, int value_slot) {
    groups.emplace_back();
    read({Kind::kWeights, weight_slot, block}, sums);
    read({Kind::kValues, value_slot, block}, kReaders * sums++ + warpgroup);
  }
  template <int kPending>
  void finish_products() {
    const int event = next();
    while (groups.size() > static_cast<size_t>(kPending)) {
      for (const auto& [slot, index] : groups.front()) cluster.accesses[slot][index].end = event;
      groups.erase(groups.begin());
    }
  }
  void write(const Place& slot, int piece) {
    const int event = next();
    access(slot, event, event, piece, true, warpgroup);
  }
  void weigh(int slot) { write({Kind::kWeights, slot, block}, weighed++); }
  void collect_results() {
    for (int slot = 0; slot < Schedule::kValueSlots; ++slot) write({Kind::kValues, slot, block}, kResultPiece);
  }
  void store_results() {
    for (int slot = 0; slot < Schedule::kValueSlots; ++slot) {
      const int event = next();
      access({Kind::kValues, slot, block}, event, event, kResultPiece, false, 0);
    }
  }
  void share_maximum() {}
  void share_sums() {}
  void rescale() {}
};

// Adds the ends of phases to the graph, and the meetings.
void connect(Cluster& cluster) {
  for (auto& [barrier, phases] : cluster.counts) {
    for (const auto& [phase, counts] : phases) {
      const int end = cluster.ends[barrier][phase] = cluster.graph.event();
      for (const Count& count : counts) cluster.graph.order(count.event, end);
      if (phase > 0) cluster.graph.order(cluster.ends[barrier][phase - 1], end);
    }
  }
  for (const auto& [barrier, waits] : cluster.waits) {
    for (const Wait& wait : waits) {
      if (wait.phase < 0) continue;
      const auto& counts = cluster.counts[barrier][wait.phase];
      const auto halves = std::count_if(counts.begin(), counts.end(), [](const Count& c) { return c.bytes; });
      const auto arrivals = static_cast<long>(counts.size()) - halves;
      if (arrivals != expected_arrivals(barrier.kind) || halves != expected_halves(barrier.kind)) {
        throw Wrong{"phase " + std::to_string(wait.phase) + " of " + barrier.name() + " gets " +
                    std::to_string(arrivals) + " arrivals and " + std::to_string(halves) + " halves, expected " +
                    std::to_string(expected_arrivals(barrier.kind)) + " and " +
                    std::to_string(expected_halves(barrier.kind))};
      }
      cluster.graph.order(cluster.ends[barrier][wait.phase], wait.event);
    }
  }
  for (const auto& [where, events] : cluster.meetings) {
    if (events.size() != kReaders) throw Wrong{"deadlock: a warpgroup waits for one that does not come"};
    for (const int event : events) {
      for (const int other : events) cluster.graph.order(event, other + 1);  // the event after its meeting
    }
  }
}

void check_phases(Cluster& cluster) {
  const Graph& graph = cluster.graph;
  for (const auto& [barrier, phases] : cluster.counts) {
    for (const auto& [phase, counts] : phases) {
      for (const Count& count : counts) {
        if (phase > 0 && !graph.comes_before(cluster.ends[barrier][phase - 1], count.event)) {
          throw Wrong{"something may count for phase " + std::to_string(phase - 1) + " of " + barrier.name() +
                      " that is meant for the next one"};
        }
      }
    }
  }
  for (const auto& [barrier, waits] : cluster.waits) {
    const auto& ends = cluster.ends[barrier];
    for (const Wait& wait : waits) {
      const auto earlier = ends.find(wait.phase - 1), later = ends.find(wait.phase + 1);
      if (earlier != ends.end() && !graph.comes_before(earlier->second, wait.before)) {
        throw Wrong{"who waits for phase " + std::to_string(wait.phase) + " of " + barrier.name() +
                    " may go on by the parity of the one before the last"};
      }
      if (later != ends.end() && !graph.comes_before(wait.event, later->second)) {
        throw Wrong{"who waits for phase " + std::to_string(wait.phase) + " of " + barrier.name() +
                    " may be overtaken by the one after it"};
      }
    }
  }
}

void check_slots(const Cluster& cluster) {
  const Graph& graph = cluster.graph;
  for (const auto& [slot, accesses] : cluster.accesses) {
    for (const Access& access : accesses) {
      if (access.end < 0) throw Wrong{"nobody waits for a product that reads " + slot.name()};
      // All writes of another piece are over before the piece is written, or begin after the access.
      std::vector<const Access*> sources;
      for (const Access& other : accesses) {
        if (other.writes && other.piece == access.piece) sources.push_back(&other);
      }
      if (!access.writes) {
        int halves = 0;
        for (const Access* source : sources) {
          halves |= 1 << source->half;
          if (!graph.comes_before(source->end, access.begin)) {
            throw Wrong{"piece " + std::to_string(access.piece) + " of " + slot.name() + " may be read unwritten"};
          }
        }
        if (halves != (1 << kBlocks) - 1) {
          throw Wrong{"piece " + std::to_string(access.piece) + " is never written to " + slot.name()};
        }
      }
      for (const Access& other : accesses) {
        if (!other.writes || other.piece == access.piece) continue;
        const bool after = graph.comes_before(access.end, other.begin);
        const bool before = std::all_of(sources.begin(), sources.end(), [&](const Access* source) {
          return graph.comes_before(other.end, source->begin);
        });
        if (!after && !before) {
          throw Wrong{"piece " + std::to_string(other.piece) + " may be written to " + slot.name() + " over piece " +
                      std::to_string(access.piece) + (access.writes ? "" : ", which is being read")};
        }
      }
    }
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) return std::fprintf(stderr, "usage: schedule STEPS\n"), 3;
  const int steps = std::atoi(words[1]);
  Cluster cluster;
  try {
    for (int block = 0; block < kBlocks; ++block) {
      const int first = block * (kReaders + 1);
      for (int warpgroup = 0; warpgroup < kReaders; ++warpgroup) {
        Reader reader(cluster, block, first + warpgroup, warpgroup);
        attend(reader, steps, warpgroup);
      }
      Loader loader(cluster, block, first + kReaders);
      load_pieces(loader, steps);
    }
    connect(cluster);
    cluster.graph.close();
    check_phases(cluster);
    check_slots(cluster);
  } catch (const Wrong& wrong) {
    std::printf("%s\n", wrong.what.c_str());
    return 1;
  }
  std::printf("%zu events\n", cluster.graph.size());
  return 0;
}
