// How long work items take: a histogram per sphere.
//
//     const std::uint64_t begin = now_ns();
//     ...items...
//     times.add(now_ns() - begin, items);
//
// Bucket 0 holds times under 64 ns, the last one those of 2^38 ns (275 s) and more.  Between them
// each doubling is cut into four buckets of equal width (64, 80, 96, 112, 128, 160, ... ns), so
// that the bucket of a time is its highest set bit and the two bits below, and no bucket is wider
// than a quarter of its lower edge.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "platform.h"

namespace torch_spheres {

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
