// What differs between systems and compilers: sleeping on a word, threads' names, fork, the CPU.
//
//     sleeper:  while (word.load() == seen) wait_on(word, seen);       or wait_on(word, seen,
//     until) waker:    word.store(other);  wake_one(word);                    or wake_all(word)
//
// In these headers an Atomic is std::atomic, or in tests one whose every access gives other threads
// a chance (tests/cpp/shaky_atomic.h).
//
// Any thread: everything.  A wait ends when somebody wakes the word, when it does not hold `seen`
// any more, when its time is over, or for no reason: callers loop.
//
// Why not std::atomic::wait: libstdc++ counts its sleepers in sixteen places, by address, and all
// words of 64-aligned objects share one, so that every notify looks like one to somebody asleep; it
// has no limit of time, and libc++ goes through a table of its own.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>
#endif

namespace torch_spheres {

using Deadline = std::chrono::steady_clock::time_point;
inline constexpr Deadline kForever = Deadline::max();

inline std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                        std::chrono::steady_clock::now().time_since_epoch())
                                        .count());
}

/// Tells the core that the thread spins.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

/// Where there is no futex: a few mutexes, chosen by the word's address.
namespace portable {

struct Place {
  std::mutex mutex;
  std::condition_variable woken;
};
inline Place& place_of(const void* word) {
  static Place places[64];
  return places[reinterpret_cast<std::uintptr_t>(word) / 64 % 64];
}
template <typename Atomic>
void wait_on(const Atomic& word, std::uint32_t seen, Deadline until = kForever) {
  Place& place = place_of(&word);
  std::unique_lock lock(place.mutex);
  if (word.load(std::memory_order_acquire) != seen) return;
  if (until == kForever) {
    place.woken.wait(lock);
  } else {
    place.woken.wait_until(lock, until);
  }
}
/// Words share places: all are woken, and look again.
template <typename Atomic>
void wake_all(Atomic& word) {
  Place& place = place_of(&word);
  // A sleeper that has looked at the word and does not sleep yet has the mutex.
  {
    const std::lock_guard lock(place.mutex);
  }
  place.woken.notify_all();
}
template <typename Atomic>
void wake_one(Atomic& word) {
  wake_all(word);
}

}  // namespace portable

#if defined(__linux__)
template <typename Atomic>
void wait_on(const Atomic& word, std::uint32_t seen, Deadline until = kForever) {
  static_assert(sizeof(word) == sizeof(std::uint32_t));
  timespec left{};
  if (until != kForever) {
    const auto ns = std::chrono::nanoseconds(until - std::chrono::steady_clock::now()).count();
    if (ns <= 0) return;
    left = {static_cast<std::time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
  }
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, until == kForever ? nullptr : &left, nullptr,
          0);
}
template <typename Atomic>
void wake_one(Atomic& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}
template <typename Atomic>
void wake_all(Atomic& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
using portable::wait_on;
using portable::wake_all;
using portable::wake_one;
#endif

/// Of the calling thread; Linux keeps 15 characters.
inline void set_thread_name(const std::string& name) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), name.c_str());
#elif defined(__APPLE__)
  pthread_setname_np(name.c_str());
#endif
}
inline std::string thread_name() {
  char name[64] = "";
#if defined(__linux__) || defined(__APPLE__)
  pthread_getname_np(pthread_self(), name, sizeof(name));
#endif
  return name;
}

/// The kernel's number of the calling thread, by which profilers know it too.
inline std::int64_t native_thread_id() {
#if defined(__linux__)
  return static_cast<std::int64_t>(syscall(SYS_gettid));
#else
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pthread_self()));
#endif
}

/// How many forks lie between this process and the one that called this first.
inline std::uint64_t fork_generation() {
  static std::atomic<std::uint64_t> forks{0};
  // Only counts, so it is safe in the child of a process with many threads.
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}

}  // namespace torch_spheres
