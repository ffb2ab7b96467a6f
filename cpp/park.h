// A place where one thread sleeps until another has something for it.
//
//     owner:   for (;;) { if (take_something()) continue; parker.park(); }
//     others:  publish_something(); parker.wake();
//
// Owner only: park.   Any thread: wake.
//
// Ordering: both sides read-modify-write the same word, so one of them comes second.  If wake comes
// second it sees kParked and notifies; if park comes second it sees the token and returns at once.
// wake's exchange releases and park's acquires, so what was published before wake() is visible
// after park().  A token that was not needed costs one spurious return: callers loop.
#pragma once

#include <atomic>
#include <cstdint>

namespace torch_spheres {

/// Atomic: tests put another in its place, which gives other threads a chance at every access.
template <template <typename> class Atomic>
class BasicParker {
 public:
  void park() {
    std::uint32_t seen = kEmpty;
    if (word_.compare_exchange_strong(seen, kParked, std::memory_order_acq_rel)) {
      // std::atomic::wait may return spuriously on some platforms, never before the value changed.
      while ((seen = word_.load(std::memory_order_acquire)) == kParked) {
        word_.wait(kParked, std::memory_order_acquire);
      }
    }
    word_.exchange(kEmpty, std::memory_order_acq_rel);  // consumes the token
  }

  void wake() {
    if (word_.exchange(kToken, std::memory_order_acq_rel) == kParked) word_.notify_one();
  }

 private:
  static constexpr std::uint32_t kEmpty = 0;
  static constexpr std::uint32_t kToken = 1;
  static constexpr std::uint32_t kParked = 2;
  Atomic<std::uint32_t> word_{kEmpty};
};
using Parker = BasicParker<std::atomic>;

}  // namespace torch_spheres
