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
#include <cstddef>
#include <cstdint>

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

/// Length of a tick, measured since the first call; exact to about 1e-6 after a second.
inline double ns_per_tick() {
#if defined(__x86_64__)
  struct Moment {
    std::uint64_t ns = 0, ticks = 0;
    Moment() {
      // Both clocks at once, as nearly as the scheduler lets us.
      std::uint64_t least = ~std::uint64_t{0};
      for (int i = 0; i < 8 && least > 500; ++i) {
        const std::uint64_t before = now_ns();
        const std::uint64_t middle = torch_spheres::ticks();
        const std::uint64_t took = now_ns() - before;
        if (took >= least) continue;
        least = took;
        ns = before + took / 2;
        ticks = middle;
      }
    }
  };
  constexpr std::uint64_t kLongEnough = 1'000'000'000;
  static const Moment origin;
  static std::atomic<double> known{0};
  if (const double value = known.load(std::memory_order_relaxed); value != 0) return value;
  const Moment now;
  if (now.ticks <= origin.ticks || now.ns <= origin.ns) return 1;
  const auto ns = static_cast<double>(now.ns - origin.ns);
  const double value = ns / static_cast<double>(now.ticks - origin.ticks);
  if (now.ns - origin.ns >= kLongEnough) known.store(value, std::memory_order_relaxed);
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
