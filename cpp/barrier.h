// A place where a known number of spheres meet, and that an error or stop() opens for good.
//
//     caller:  id = barrier.open(spheres)         (one meeting at a time)
//     sphere:  barrier.arrive(id) -> last: release everybody;  then sleep until was_released(id)
//     anyone:  barrier.abort(id)                  the spheres go on, the caller is told
//
// Any thread: everything; open only after the last meeting was released.
//
// Ordering: the meeting's number and its arrivals share one word, so a late arrival for a meeting
// that was aborted cannot be counted for the next one.  released_ is stored with release after the
// last arrival's acq_rel RMW; who sees it (acquire) sees what every sphere did before it arrived.
// closed_ also remembers how the last 32 meetings ended, so that who asks late, when the next one
// is over already, is told of its own.
#pragma once

#include <atomic>
#include <cstdint>

namespace torch_spheres {

enum class Meeting : std::uint8_t { kPending, kReleased, kAborted };

template <template <typename> class Atomic>
class BasicBarrier {
 public:
  /// Starts a meeting of `expected` spheres and returns its number, 1, 2, ...
  std::uint32_t open(std::uint32_t expected) {
    const std::uint32_t id = number(word_.load(std::memory_order_relaxed)) + 1;
    expected_.store(expected, std::memory_order_relaxed);
    word_.store(pack(id, 0));  // seq_cst, as current(): see Sphere::arrive_if_ready
    return id;
  }
  /// True for the last one to arrive, who must call release(id).
  bool arrive(std::uint32_t id) {
    std::uint64_t word = word_.load(std::memory_order_acquire);
    while (number(word) == id && !was_released(id)) {
      const std::uint32_t here = static_cast<std::uint32_t>(word) + 1;
      if (word_.compare_exchange_weak(word, pack(id, here), std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
        return here == expected_.load(std::memory_order_relaxed);
      }
    }
    return false;
  }
  /// False if the meeting was aborted before.
  bool release(std::uint32_t id) { return close(id, Meeting::kReleased); }
  /// True if this call ended the meeting.
  bool abort(std::uint32_t id) { return close(id, Meeting::kAborted); }

  bool was_released(std::uint32_t id) const {
    return number(closed_.load(std::memory_order_acquire)) >= id;
  }
  /// Of one of the last 32 meetings.
  Meeting outcome(std::uint32_t id) const {
    const std::uint64_t closed = closed_.load(std::memory_order_acquire);
    if (number(closed) < id) return Meeting::kPending;
    const std::uint32_t age = number(closed) - id;
    const bool aborted = age < 32 && ((static_cast<std::uint32_t>(closed) >> age) & 1) != 0;
    return aborted ? Meeting::kAborted : Meeting::kReleased;
  }
  std::uint32_t current() const { return number(word_.load()); }

 private:
  static std::uint64_t pack(std::uint32_t id, std::uint32_t low) {
    return (static_cast<std::uint64_t>(id) << 32) | low;
  }
  static std::uint32_t number(std::uint64_t word) { return static_cast<std::uint32_t>(word >> 32); }
  bool close(std::uint32_t id, Meeting how) {
    std::uint64_t closed = closed_.load(std::memory_order_relaxed);
    while (number(closed) < id) {  // so id is the next one: meetings are opened one at a time
      const std::uint32_t history = (static_cast<std::uint32_t>(closed) << 1) |
                                    static_cast<std::uint32_t>(how == Meeting::kAborted);
      if (closed_.compare_exchange_weak(closed, pack(id, history), std::memory_order_acq_rel)) {
        return true;
      }
    }
    return false;
  }

  Atomic<std::uint64_t> word_{0};    // meeting << 32 | arrivals
  Atomic<std::uint64_t> closed_{0};  // last meeting that ended << 32 | a bit per aborted one
  Atomic<std::uint32_t> expected_{0};
};
using Barrier = BasicBarrier<std::atomic>;

}  // namespace torch_spheres
