// What a sphere is doing, has done, and for how long.
//
// Counters are written by the sphere they belong to with plain relaxed adds, or (where others
// count for it: items_given, messages) with relaxed fetch_add; nobody orders anything by them, so
// relaxed is enough, but for StateClock, whose times are read together.  A snapshot is a value and
// never changes.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>

#include "item_times.h"
#include "topology.h"

namespace torch_spheres {

/// Every moment of a sphere's thread belongs to exactly one state.
enum class State : std::uint8_t {
  kReady,         ///< awake: reading messages, handing work down, looking for work
  kProcessing,    ///< running work items
  kIdle,          ///< asleep: nothing to do
  kWaiting,       ///< asleep at a barrier, or in an item, that waits for other spheres
  kAccumulating,  ///< summing gradients
  kTerminating,   ///< leaving: the thread ends; also the state before start()
};
inline constexpr int kStates = 6;

inline const char* state_name(State state) {
  static constexpr const char* names[kStates] = {"READY",   "PROCESSING",   "IDLE",
                                                 "WAITING", "ACCUMULATING", "TERMINATING"};
  return names[static_cast<int>(state)];
}

/// The one rule of transitions: READY is the hub, as a sphere is awake between any two jobs. (After
/// TERMINATING, start() makes a new thread for the same sphere.)
inline bool transition_allowed(State from, State to) {
  return (from == State::kReady) != (to == State::kReady);
}

/// What ended with a transition of a StateClock; end 0: nothing did.
struct EndedState {
  State state = State::kTerminating;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// A sphere's state and the time spent in each.   Owner: transition.   Any thread: the rest.
template <template <typename> class Atomic>
class BasicStateClock {
 public:
  /// Changes the state; the only place that does.  An illegal change is a bug of ours: abort.
  EndedState transition(State to) {
    const std::uint64_t packed = packed_.load(std::memory_order_relaxed);
    const State from = unpack_state(packed);
    if (from == to) return {};
    if (!transition_allowed(from, to)) {
      std::fprintf(stderr, "torch_spheres: illegal transition %s -> %s\n", state_name(from),
                   state_name(to));
      std::abort();
    }
    // The release stores pair with the acquire loads of times(): who sees one of the two sees
    // changes_ odd as well.
    const std::uint32_t changes = changes_.load(std::memory_order_relaxed);
    changes_.store(changes + 1, std::memory_order_relaxed);
    const std::uint64_t now = now_ns();  // here: times() waits for a thread that loses its core now
    auto& spent = ns_[static_cast<std::size_t>(from)];
    spent.store(spent.load(std::memory_order_relaxed) + (now - (packed >> kStateBits)),
                std::memory_order_release);
    // seq_cst: with now(), for change_state().
    packed_.store((now << kStateBits) | static_cast<std::uint64_t>(to));
    changes_.store(changes + 2, std::memory_order_release);
    return {from, packed >> kStateBits, now};
  }

  State state() const { return unpack_state(packed_.load(std::memory_order_relaxed)); }
  /// The state and when it began.
  std::pair<State, std::uint64_t> now() const {
    const std::uint64_t packed = packed_.load();  // seq_cst: with transition()
    return {unpack_state(packed), packed >> kStateBits};
  }

  /// Nanoseconds in each state, the running one up to now.  TERMINATING is not counted on.  Never
  /// less than what was read before, by whomever; a transition under way is waited for.
  std::array<std::uint64_t, kStates> times() const {
    std::array<std::uint64_t, kStates> result{};
    std::uint64_t packed = 0, now = 0;
    // (In the child of a fork() a sphere may be in the middle of one for ever.)
    for (int i = 0; i < kPatience; ++i) {
      const std::uint32_t changes = changes_.load(std::memory_order_acquire);
      for (std::size_t s = 0; s < kStates; ++s) result[s] = ns_[s].load(std::memory_order_acquire);
      packed = packed_.load(std::memory_order_acquire);
      now = now_ns();  // before the second look: the state goes on until then
      if (changes % 2 == 0 && changes_.load(std::memory_order_relaxed) == changes) break;
      std::this_thread::yield();
    }
    result[static_cast<std::size_t>(State::kTerminating)] = 0;
    const std::uint64_t since = packed >> kStateBits;
    if (unpack_state(packed) != State::kTerminating && now > since) {
      result[static_cast<std::size_t>(unpack_state(packed))] += now - since;
    }
    // (What a transition writes first may be seen a few nanoseconds after it has looked at the
    // clock.)
    for (std::size_t s = 0; s < kStates; ++s) result[s] = at_least_as_before(s, result[s]);
    return result;
  }

 private:
  std::uint64_t at_least_as_before(std::size_t state, std::uint64_t ns) const {
    std::uint64_t before = reported_[state].load(std::memory_order_relaxed);
    while (before < ns) {
      if (reported_[state].compare_exchange_weak(before, ns, std::memory_order_relaxed)) return ns;
    }
    return before;
  }

  static constexpr int kPatience = 10'000;
  static constexpr int kStateBits = 3;  // state and "since" in one word, so they are read together
  static State unpack_state(std::uint64_t packed) {
    return static_cast<State>(packed & ((1u << kStateBits) - 1));
  }
  Atomic<std::uint64_t> packed_{static_cast<std::uint64_t>(State::kTerminating)};
  std::array<Atomic<std::uint64_t>, kStates> ns_{};
  Atomic<std::uint32_t> changes_{0};                               // odd during a transition
  mutable std::array<Atomic<std::uint64_t>, kStates> reported_{};  // the most that was read
};
using StateClock = BasicStateClock<std::atomic>;

/// A count that any thread writes.
class SharedCounter {
 public:
  void add(std::uint64_t n) { value_.fetch_add(n, std::memory_order_relaxed); }
  std::uint64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

/// A leaf's counters that claims touch.
struct WorkCounters {
  OwnerCounter items_run;
  OwnerCounter items_stolen;
  ItemTimes item_times;                              // but for pieces of gradient sums
  std::array<OwnerCounter, kKissing> stolen_from{};  // items_stolen by the owner's group
  alignas(64) SharedCounter items_given;
};

/// One sphere's figures at one moment.
struct SphereStats {
  SphereId id = 0;
  State state = State::kTerminating;
  std::uint64_t items_run = 0;           ///< items this sphere ran, stolen ones included
  std::uint64_t items_stolen = 0;        ///< of those, items that belonged to a sibling
  std::uint64_t items_given = 0;         ///< items of its own that siblings took
  std::uint64_t messages_sent = 0;       ///< messages along edges from this sphere
  std::uint64_t messages_received = 0;   ///< messages taken out of its mailbox
  std::uint64_t queue_high_water = 0;    ///< most items ever waiting in its queue at hand-down
  std::uint64_t queued = 0;              ///< items waiting in its queue now; inner: its subtree's
  std::uint64_t item_time_ns = 0;        ///< time inside items, but for pieces of gradient sums
  ItemTimes::Counts item_time_counts{};  ///< those items by time
  std::array<std::uint64_t, kKissing> stolen_from{};  ///< items_stolen by the owner's group
  std::array<std::uint64_t, kStates> state_ns{};
};

/// The sums of a subtree's figures at about one moment (each is read at its own): one line of a
/// live display.  With four levels thirteen of these are 1885 spheres, four times a second, so
/// nobody makes 1885 objects of them.
struct SubtreeTotals {
  std::array<std::int32_t, kStates> spheres{};  ///< how many are in each state, in State's order
  std::uint64_t items_run = 0;
  std::uint64_t items_stolen = 0;
  std::uint64_t queued = 0;      ///< items that wait in the leaves' queues
  std::uint64_t busy_ns = 0;     ///< processing and accumulating, added up over the spheres
  std::uint64_t elapsed_ns = 0;  ///< since start(), until stop(): of the first sphere
};

}  // namespace torch_spheres
