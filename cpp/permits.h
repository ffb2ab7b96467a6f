// Who may run: at most `concurrency` leaves at once, and which leaf is next.
//
//     permits.try_acquire()  permits.release()    so many may run
//     idle.add(leaf)         idle.remove(leaf)    a leaf has nothing to do, or something else
//     while ((leaf = turns.next(may_have_work)) >= 0) wake(leaf);        after any change
//
// Any thread: everything.   Lock-free.
//
// Invariant: whoever takes a leaf out of a LeafSet (by pop, or by a remove that says true) has it:
// exactly one of several that try.
// Ordering: everything is seq_cst, see Turns::next().
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>

namespace torch_spheres {

template <template <typename> class Atomic>
class BasicPermits {
 public:
  explicit BasicPermits(std::int32_t permits) : free_(permits) {}

  bool was_free() const { return free_.load() > 0; }
  bool try_acquire() {
    std::int32_t free = free_.load();
    while (free > 0) {
      if (free_.compare_exchange_weak(free, free - 1)) return true;
    }
    return false;
  }
  void release() { free_.fetch_add(1); }
  /// Before the spheres start.
  void reset(std::int32_t permits) { free_.store(permits); }

 private:
  alignas(64) Atomic<std::int32_t> free_;
};

/// A set of leaves, of which the lowest comes first: the same few threads stay warm when there are
/// fewer permits than leaves.
template <template <typename> class Atomic>
class BasicLeafSet {
 public:
  explicit BasicLeafSet(std::int32_t leaves)
      : words_((leaves + 63) / 64),
        bits_(std::make_unique<Word[]>(static_cast<std::size_t>(words_))) {}

  void add(std::int32_t leaf) { word(leaf).fetch_or(bit(leaf)); }
  /// False: it is not, or no longer, in there.
  bool remove(std::int32_t leaf) { return (word(leaf).fetch_and(~bit(leaf)) & bit(leaf)) != 0; }
  bool was_any() const {
    for (std::int32_t w = 0; w < words_; ++w) {
      if (bits_[static_cast<std::size_t>(w)].load() != 0) return true;
    }
    return false;
  }
  /// Takes the lowest one out; -1: there is none.
  std::int32_t pop() {
    for (std::int32_t w = 0; w < words_; ++w) {
      std::uint64_t seen = bits_[static_cast<std::size_t>(w)].load();
      for (; seen != 0; seen &= seen - 1) {
        const std::int32_t leaf = w * 64 + std::countr_zero(seen);
        if (remove(leaf)) return leaf;
      }
    }
    return -1;
  }
  /// Before the spheres start.
  void clear() {
    for (std::int32_t w = 0; w < words_; ++w) bits_[static_cast<std::size_t>(w)].store(0);
  }

 private:
  using Word = Atomic<std::uint64_t>;
  static std::uint64_t bit(std::int32_t leaf) { return std::uint64_t{1} << (leaf % 64); }
  Word& word(std::int32_t leaf) { return bits_[static_cast<std::size_t>(leaf / 64)]; }

  const std::int32_t words_;
  const std::unique_ptr<Word[]> bits_;
};

/// Whom to wake.  A batch was published, a permit released, a leaf became idle, or the one that
/// looked found something or nothing: whoever did that asks next().  It gives one idle leaf a turn,
/// and that one looks; nobody else is woken until it has found something, stops looking, and asks
/// next() itself.  So k items run on k leaves after k - 1 such steps.
///
/// Ordering: the words (open batches, permits, idle leaves, looking_) are seq_cst, and everybody
/// changes one first and then looks at all.  So of several the last to change anything sees all
/// changes, or sees looking_; then whoever set that clears it later, and looks once more.
template <template <typename> class Atomic>
class BasicTurns {
 public:
  BasicTurns(std::int32_t leaves, std::int32_t at_once)
      : permits(at_once), awake(leaves), asleep(leaves), returning(leaves) {}

  /// The next leaf to be told of its turn, which has a permit now; -1: nobody.
  template <typename MayHaveWork>
  std::int32_t next(MayHaveWork may_have_work) {
    for (;;) {
      // Those in the middle of an item come first: others may wait for what they are at.
      while (returning.was_any() && permits.try_acquire()) {
        if (const std::int32_t leaf = returning.pop(); leaf >= 0) return leaf;
        permits.release();
      }
      if (!may_have_work() || !permits.was_free() || (!awake.was_any() && !asleep.was_any()) ||
          looking_.exchange(true)) {
        return -1;
      }
      if (permits.try_acquire()) {
        std::int32_t leaf = awake.pop();  // needs no system call
        if (leaf < 0) leaf = asleep.pop();
        if (leaf >= 0) return leaf;
        permits.release();
      }
      looking_.store(false);
    }
  }
  /// By the leaf that got the turn to look; it asks next() afterwards.
  void stop_looking() { looking_.store(false); }
  /// Before the spheres start.
  void reset(std::int32_t at_once) {
    permits.reset(at_once);
    for (auto* set : {&awake, &asleep, &returning}) set->clear();
    looking_.store(false);
  }

  BasicPermits<Atomic> permits;
  BasicLeafSet<Atomic> awake;      // leaves that have nothing to do, and spin
  BasicLeafSet<Atomic> asleep;     // leaves that have nothing to do, and sleep
  BasicLeafSet<Atomic> returning;  // leaves in the middle of an item, that want a permit to go on

 private:
  Atomic<bool> looking_{false};  // a leaf was given a turn and has not found anything yet
};
using Turns = BasicTurns<std::atomic>;

}  // namespace torch_spheres
