// How long work items take: a histogram per sphere, and the cheap clock that feeds it.
//
//     const std::uint64_t begin = ticks();
//     ...items...
//     times.add(ticks_to_ns(ticks() - begin, ns_per_tick()), items);
//
// Bucket 0 holds times under 64 ns, the last one those of 2^38 ns (275 s) and more.  Between them
// each doubling is cut into four buckets of equal width (64, 80, 96, 112, 128, 160, ... ns), so
// that the bucket of a time is its highest set bit and the two bits below, and no bucket is wider
// than a quarter of its lower edge.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace torch_spheres {

inline std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                        std::chrono::steady_clock::now().time_since_epoch())
                                        .count());
}

/// A clock of steady ticks that costs half of what now_ns() does.
inline std::uint64_t ticks() {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#else
  return now_ns();
#endif
}

/// Both clocks at once, as nearly as the scheduler lets us.
struct ClockMoment {
  std::uint64_t ns = 0, ticks = 0;

  static ClockMoment now() {
    ClockMoment moment;
    std::uint64_t least = ~std::uint64_t{0};
    for (int i = 0; i < 8 && least > 500; ++i) {
      const std::uint64_t before = now_ns();
      const std::uint64_t middle = torch_spheres::ticks();
      const std::uint64_t took = now_ns() - before;
      if (took >= least) continue;
      least = took;
      moment = {before + took / 2, middle};
    }
    return moment;
  }
};

/// The length of a tick, measured over spans of half a second and more until two in a row agree:
/// while a machine sleeps, or is copied, only one of the clocks may go on, or ticks begin anew.
/// Exact to about 1e-6 once settled.
class TickLength {
 public:
  explicit TickLength(ClockMoment first) : begin_(first) {}

  /// The nanoseconds of a tick, by all that is known at this moment.
  double at(ClockMoment now) {
    if (now.ticks <= begin_.ticks || now.ns <= begin_.ns) {
      begin_ = now;
      return last_ != 0 ? last_ : 1;
    }
    const auto ns = static_cast<double>(now.ns - begin_.ns);
    const double length = ns / static_cast<double>(now.ticks - begin_.ticks);
    if (now.ns - begin_.ns < kSpan) return last_ != 0 ? last_ : length;
    // Far less than a bucket's width, far more than what two spans differ by on their own.
    settled_ = std::abs(length - last_) <= 1e-3 * last_;
    last_ = length;
    begin_ = now;
    return length;
  }
  bool settled() const { return settled_; }

 private:
  static constexpr std::uint64_t kSpan = 500'000'000;
  ClockMoment begin_;  // of the span
  double last_ = 0;    // of the last whole span, 0: there is none yet
  bool settled_ = false;
};

/// Length of a tick, measured since the first call.
inline double ns_per_tick() {
#if defined(__x86_64__)
  static std::atomic<double> known{0};  // relaxed: a value on its own
  if (const double value = known.load(std::memory_order_relaxed); value != 0) return value;
  static std::mutex mutex;
  static TickLength length(ClockMoment::now());  // under `mutex`
  static std::atomic<double> guess{1};
  const std::unique_lock lock(mutex, std::try_to_lock);
  if (!lock) return guess.load(std::memory_order_relaxed);  // somebody measures just now
  const double value = length.at(ClockMoment::now());
  guess.store(value, std::memory_order_relaxed);
  if (length.settled()) known.store(value, std::memory_order_relaxed);
  return value;
#else
  return 1;
#endif
}

/// Nanoseconds between two tick counts; 0 if they come from cores whose counts differ.
inline std::uint64_t elapsed_ns(std::uint64_t begin, std::uint64_t end, double ns_per_tick) {
  if (end <= begin) return 0;
  return static_cast<std::uint64_t>(static_cast<double>(end - begin) * ns_per_tick);
}

/// A count that one thread writes and any thread reads.
class OwnerCounter {
 public:
  void add(std::uint64_t n) {
    value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
  }
  void raise_to(std::uint64_t n) {
    if (n > value_.load(std::memory_order_relaxed)) value_.store(n, std::memory_order_relaxed);
  }
  std::uint64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

/// A histogram of item times.   Owner: add.   Any thread: counts, total_ns.
class ItemTimes {
 public:
  static constexpr int kFirstBit = 6, kLastBit = 38;
  static constexpr std::size_t kBuckets = 4 * (kLastBit - kFirstBit) + 2;
  using Counts = std::array<std::uint64_t, kBuckets>;

  /// The bucket of a time.
  static constexpr std::size_t bucket(std::uint64_t ns) {
    const int high = std::bit_width(ns) - 1;
    if (high < kFirstBit) return 0;
    if (high >= kLastBit) return kBuckets - 1;
    const std::uint64_t quarter = (ns >> (high - 2)) & 3;
    return 1 + 4 * static_cast<std::size_t>(high - kFirstBit) + quarter;
  }
  /// The least time beyond a bucket; every bucket but the last has one.
  static constexpr std::uint64_t edge(std::size_t bucket) {
    return (4 + bucket % 4) << (kFirstBit - 2 + bucket / 4);
  }

  /// Counts `items` that took `ns` together, each with their mean.
  void add(std::uint64_t ns, std::uint64_t items) {
    counts_[bucket(items == 1 ? ns : ns / items)].add(items);
    total_.add(ns);
  }

  Counts counts() const {
    Counts result{};
    for (std::size_t i = 0; i < kBuckets; ++i) result[i] = counts_[i].get();
    return result;
  }
  std::uint64_t total_ns() const { return total_.get(); }

 private:
  OwnerCounter total_;
  std::array<OwnerCounter, kBuckets> counts_;
};

}  // namespace torch_spheres
