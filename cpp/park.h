// Places where threads sleep until another has something for them: one thread, or all that wait
// for news.
//
//     owner:   for (;;) { if (take_something()) continue; parker.park(); }
//     others:  publish_something(); parker.wake();
//
//     anybody: news.wait(until, [&] { return something(); });
//     others:  change_something(); news.tell();
//
// Owner only: Parker::park, spin.   Any thread: the rest.
//
// Ordering: both sides read-modify-write the same word, so one of them comes second.  If wake comes
// second it sees kParked and makes a system call; if park comes second it sees the token and
// returns at once.  wake's exchange releases and park's acquires, so what was published before
// wake() is visible after park().  A token that was not needed costs one spurious return: callers
// loop.  News is the same with a bit that says that somebody sleeps: nobody makes a system call for
// people who are awake, and none is made under a lock.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "platform.h"

namespace torch_spheres {

/// How long a thread looks for something to do before it sleeps: several times what that and being
/// woken cost, and too short for anybody to notice.
inline constexpr std::uint64_t kSpinNs = 20'000;
/// Of a thread that waits for others: until one of them is awake (20 to 25 µs on a virtual machine)
/// and has run something short.  With less, each sleeps just before the other is done, every time.
inline constexpr std::uint64_t kWaiterSpinNs = 40'000;

/// Counts a thread while it lives: those that spin, or wait, or are at something.
class CountedThread {
 public:
  explicit CountedThread(std::atomic<int>& count) : count_(count), before_(count.fetch_add(1)) {}
  ~CountedThread() { count_.fetch_sub(1); }
  CountedThread(const CountedThread&) = delete;
  CountedThread& operator=(const CountedThread&) = delete;
  /// How many were counted already.
  int before() const { return before_; }

 private:
  std::atomic<int>& count_;
  const int before_;
};

/// Whether spinning has paid lately.  It does not where the one that is waited for needs this very
/// core, or comes much later; then it is tried only now and then.   Any thread: everything.
class Luck {
 public:
  bool allows() { return credit_.load(kRelaxed) > 0 || tries_.fetch_add(1, kRelaxed) % 16 == 15; }
  void tell(bool paid) {
    // Relaxed, and one of two that come at once may be lost: it is an estimate.
    const int credit = credit_.load(kRelaxed);
    credit_.store(paid ? std::min(credit + 4, 8) : std::max(credit - 1, 0), kRelaxed);
  }

 private:
  static constexpr auto kRelaxed = std::memory_order_relaxed;
  std::atomic<int> credit_{8};
  std::atomic<unsigned> tries_{0};
};

/// Spins until condition(), for so long at most; whether it came true.
template <typename Condition>
bool spin_until(Luck& luck, std::uint64_t ns, Condition condition) {
  if (condition()) return true;
  if (!luck.allows()) return false;
  const std::uint64_t end = now_ns() + ns;
  bool paid = false;
  do {
    for (int i = 0; i < 16 && !paid; ++i) {
      relax();
      paid = condition();
    }
  } while (!paid && now_ns() < end);
  luck.tell(paid);
  return paid;
}

template <template <typename> class Atomic>
class BasicParker {
 public:
  void park() {
    std::uint32_t seen = kEmpty;
    if (word_.compare_exchange_strong(seen, kParked, std::memory_order_acq_rel)) {
      while (word_.load(std::memory_order_acquire) == kParked) wait_on(word_, kParked);
    }
    word_.exchange(kEmpty, std::memory_order_acq_rel);  // consumes the token
  }
  /// Whether somebody woke it, now or soon; the token is left for park().
  bool spin(Luck& luck) {
    return spin_until(luck, kSpinNs,
                      [this] { return word_.load(std::memory_order_relaxed) == kToken; });
  }

  void wake() {
    if (word_.exchange(kToken, std::memory_order_acq_rel) == kParked) wake_one(word_);
  }

 private:
  static constexpr std::uint32_t kEmpty = 0;
  static constexpr std::uint32_t kToken = 1;
  static constexpr std::uint32_t kParked = 2;
  Atomic<std::uint32_t> word_{kEmpty};
};
using Parker = BasicParker<std::atomic>;

template <template <typename> class Atomic>
class BasicNews {
 public:
  /// False: the condition did not come true in time.
  template <typename Condition>
  bool wait(Deadline until, Condition condition) {
    while (!condition()) {
      const std::uint32_t seen = word_.fetch_or(kSleepers) | kSleepers;
      if (condition()) return true;
      if (std::chrono::steady_clock::now() >= until) return false;
      wait_on(word_, seen, until);
    }
    return true;
  }

  void tell() {
    std::uint32_t seen = word_.load();
    while (!word_.compare_exchange_weak(seen, (seen + kOne) & ~kSleepers)) {
    }
    if ((seen & kSleepers) != 0) wake_all(word_);
  }

 private:
  static constexpr std::uint32_t kSleepers = 1;
  static constexpr std::uint32_t kOne = 2;
  Atomic<std::uint32_t> word_{0};
};
using News = BasicNews<std::atomic>;

}  // namespace torch_spheres
