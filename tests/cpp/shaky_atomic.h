// Forces races: an atomic whose every access lets another thread run first, sometimes.
//
//     BasicParker<ShakyAtomic> parker;   // two accesses are no longer a nanosecond apart
//
// On one core a yield hands over to another thread; on several, threads that yield at random drift
// against each other.  Either way all orders of a few accesses come up within some hundred rounds.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace torch_spheres::testing {

/// Yields about every second time, and sleeps now and then, for longer than a waiting thread spins.
inline void shake() {
  thread_local std::uint32_t state =
      static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(&state) >> 4) | 1;
  state = state * 1664525 + 1013904223;
  const std::uint32_t chance = state >> 27;  // 0 to 31
  if (chance == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
  if (chance < 16) std::this_thread::yield();
}

template <typename T>
class ShakyAtomic {
 public:
  ShakyAtomic(T value = T{}) : value_(value) {}  // NOLINT: as std::atomic's
  template <typename... Order>
  T load(Order... order) const {
    shake();
    return value_.load(order...);
  }
  template <typename... Order>
  void store(T value, Order... order) {
    shake();
    value_.store(value, order...);
  }
  template <typename... Order>
  T exchange(T value, Order... order) {
    shake();
    return value_.exchange(value, order...);
  }
  template <typename... Order>
  bool compare_exchange_strong(T& expected, T desired, Order... order) {
    shake();
    return value_.compare_exchange_strong(expected, desired, order...);
  }
  template <typename... Order>
  bool compare_exchange_weak(T& expected, T desired, Order... order) {
    shake();
    return value_.compare_exchange_weak(expected, desired, order...);
  }
  template <typename... Order>
  T fetch_add(T value, Order... order) {
    shake();
    return value_.fetch_add(value, order...);
  }
  T fetch_or(T value) {
    shake();
    return value_.fetch_or(value);
  }
  T fetch_and(T value) {
    shake();
    return value_.fetch_and(value);
  }

 private:
  std::atomic<T> value_;
};

}  // namespace torch_spheres::testing
