// Who may run: at most `concurrency` leaves at once, and which leaf is next.
//
//     parent:        permits.mark_ready(leaf...);  dispatch();
//     running leaf:  ...no work left...            permits.release();  dispatch();
//     paused leaf:   is called back:               permits.mark_returning(leaf);  dispatch();
//     dispatch:      while (permits.any_ready() && permits.try_acquire()) pick one, wake it
//
// Any thread: everything.   Lock-free.
//
// Ordering: a marker writes the ready bit and then looks for a permit; a releaser gives the permit
// and then looks for ready bits; all four are seq_cst, so at least one of the two sees the other
// and no ready leaf is left behind while a permit is free.
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
  BasicPermits(std::int32_t leaves, std::int32_t permits)
      : words_((leaves + 63) / 64),
        ready_(std::make_unique<Word[]>(static_cast<std::size_t>(words_))),
        returning_(std::make_unique<Word[]>(static_cast<std::size_t>(words_))),
        free_(permits) {}

  void mark_ready(std::int32_t leaf) { mark(ready_, leaf); }
  /// The leaf is in the middle of an item, without a permit, and wants one to go on.
  void mark_returning(std::int32_t leaf) { mark(returning_, leaf); }
  bool any_ready() const { return any(ready_) || any(returning_); }
  /// Takes the lowest ready leaf off the list, or -1.  The lowest first, always: the same few
  /// threads stay warm when there are fewer permits than leaves.
  std::int32_t pop_ready() { return pop(ready_); }
  std::int32_t pop_returning() { return pop(returning_); }

  bool try_acquire() {
    std::int32_t free = free_.load();
    while (free > 0) {
      if (free_.compare_exchange_weak(free, free - 1)) return true;
    }
    return false;
  }
  void release() { free_.fetch_add(1); }
  /// Before the spheres start: everything as new.
  void reset(std::int32_t permits) {
    for (std::int32_t w = 0; w < words_; ++w) {
      ready_[static_cast<std::size_t>(w)].store(0);
      returning_[static_cast<std::size_t>(w)].store(0);
    }
    free_.store(permits);
  }

 private:
  using Word = Atomic<std::uint64_t>;
  using List = std::unique_ptr<Word[]>;

  static void mark(const List& list, std::int32_t leaf) {
    list[static_cast<std::size_t>(leaf / 64)].fetch_or(std::uint64_t{1} << (leaf % 64));
  }
  bool any(const List& list) const {
    for (std::int32_t w = 0; w < words_; ++w) {
      if (list[static_cast<std::size_t>(w)].load() != 0) return true;
    }
    return false;
  }
  std::int32_t pop(const List& list) {
    for (std::int32_t w = 0; w < words_; ++w) {
      auto& word = list[static_cast<std::size_t>(w)];
      std::uint64_t seen = word.load();
      while (seen != 0) {
        const std::uint64_t lowest = seen & (~seen + 1);
        const std::uint64_t before = word.fetch_and(~lowest);
        if ((before & lowest) != 0) return w * 64 + std::countr_zero(lowest);
        seen = before & ~lowest;  // another dispatcher took it
      }
    }
    return -1;
  }

  const std::int32_t words_;
  const List ready_;
  const List returning_;
  alignas(64) Atomic<std::int32_t> free_;
};
using Permits = BasicPermits<std::atomic>;

}  // namespace torch_spheres
