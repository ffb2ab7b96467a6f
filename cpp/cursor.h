// What is left of one leaf's slice of a batch: owner and thieves take from it, and stop() or an
// error ends it.
//
//     submitter:  cursor.fill(count)                    (while nobody else may touch it)
//     anybody:    Taken some = cursor.take(at_most)     count 0: nothing is left
//     anybody:    cursor.cancel()
//
// Invariant: low half next, high half end; `next` only grows within a batch, and fetch_add hands
// each value to one thread, so no item is taken twice; end is part of the same word, so what is
// taken is never judged by another batch's end.
// Ordering: taking is relaxed, since it only has to hand each position to one thread; what the
// batch holds was seen on entering its slot, and what the items did is published on leaving it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace torch_spheres {

/// Atomic: tests put another in its place, which gives other threads a chance at every access.
template <template <typename> class Atomic>
class alignas(64) BasicCursor {
 public:
  struct Taken {
    std::int64_t first = 0;
    std::int64_t count = 0;
  };

  void fill(std::int64_t count) { word_.store(static_cast<std::uint64_t>(count) << 32); }
  std::int64_t was_left() const { return std::max<std::int64_t>(0, left(word_.load())); }

  /// Takes a quarter of what is left, at least one and at most so many.
  Taken take(std::int64_t at_most) {
    // Looking first keeps exhausted cursors unwritten, and the overshoot of `next` within one
    // max_chunk per sphere, far from the half word's end.
    const std::int64_t seen = left(word_.load(std::memory_order_relaxed));
    if (seen <= 0) return {};
    const std::int64_t want = std::clamp<std::int64_t>(seen / 4, 1, at_most);
    const std::uint64_t old =
        word_.fetch_add(static_cast<std::uint64_t>(want), std::memory_order_relaxed);
    return {next(old), std::clamp<std::int64_t>(left(old), 0, want)};
  }
  /// Nobody takes anything any more; returns how much will never be taken.
  std::int64_t cancel() {
    const auto last = static_cast<std::uint64_t>(end(word_.load()));
    return std::max<std::int64_t>(0, left(word_.exchange((last << 32) | last)));
  }

 private:
  static std::int64_t end(std::uint64_t word) { return static_cast<std::int64_t>(word >> 32); }
  static std::int64_t next(std::uint64_t word) {
    return static_cast<std::int64_t>(word & 0xffffffffu);
  }
  static std::int64_t left(std::uint64_t word) { return end(word) - next(word); }

  Atomic<std::uint64_t> word_{0};
};
using Cursor = BasicCursor<std::atomic>;

}  // namespace torch_spheres
