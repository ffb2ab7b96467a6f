// Who may run: at most `concurrency` leaves at once, and which leaf is next.
//
//     permits.try_acquire()  permits.release()    so many may run
//     idle.add(leaf)         idle.remove(leaf)    a leaf has nothing to do, or something else
//     idle.pop()                                  somebody has something for one of them
//
// Any thread: everything.   Lock-free.
//
// Invariant: whoever takes a leaf out of a LeafSet (by pop, or by a remove that says true) has it:
// exactly one of several that try.
// Ordering: everything is seq_cst, and System::dispatch() says what that is good for.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>

namespace torch_spheres {

/// Atomic: tests put another in its place, which gives other threads a chance at every access.
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
using Permits = BasicPermits<std::atomic>;

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
using LeafSet = BasicLeafSet<std::atomic>;

}  // namespace torch_spheres
