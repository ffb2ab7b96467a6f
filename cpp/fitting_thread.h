// Starts threads until one fits: the system decides something about each that cannot be changed
// later, as glibc does about the heap that a thread takes its memory from (allocator.h).
//
//     FittingThreads threads(&fits);            // bool fits(): asked on the thread
//     sphere = threads.start(body);
//
// One that does not fit waits until all have been started, or the system would give its place to
// the next one; then it ends.  After a few tries, and where no more threads are to be had, the next
// one is taken as it is.
//
// Owner only: everything but what start()'s threads do.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "platform.h"

namespace torch_spheres {

class FittingThreads {
 public:
  /// nullptr: any thread fits.
  explicit FittingThreads(bool (*fits)()) : fits_(fits) {
    if (fits_ != nullptr) misfits_.reserve(kMisfits);
  }
  ~FittingThreads() { release(); }
  FittingThreads(const FittingThreads&) = delete;
  FittingThreads& operator=(const FittingThreads&) = delete;

  /// Throws std::system_error, as std::thread does.
  template <typename Body>
  std::thread start(const Body& body) {
    for (int tries = kTries; fits_ != nullptr && tries > 0 && misfits_.size() < kMisfits; --tries) {
      answer_.store(kNone, std::memory_order_relaxed);
      std::thread thread;
      try {
        thread = std::thread([this, body] {
          const bool fit = fits_();
          answer(fit ? kYes : kNo);
          if (fit) return body();
          while (gate_.load(std::memory_order_acquire) == kShut) wait_on(gate_, kShut);
        });
      } catch (const std::system_error&) {  // those that do not fit may be the ones too many
        fits_ = nullptr;
        release();
        break;
      }
      while (answer_.load(std::memory_order_acquire) == kNone) wait_on(answer_, kNone);
      if (answer_.load(std::memory_order_relaxed) == kYes) return thread;
      misfits_.push_back(std::move(thread));
    }
    return std::thread(body);
  }

 private:
  /// (A thread that fits may live longer than this object: it is done with it once this is told,
  /// but for the word's address.)
  void answer(std::uint32_t value) {
    answer_.store(value, std::memory_order_release);
    wake_one(answer_);
  }
  void release() {
    gate_.store(kOpen, std::memory_order_release);
    wake_all(gate_);
    for (std::thread& misfit : misfits_) misfit.join();
    misfits_.clear();
  }

  static constexpr int kTries = 32;             // for each thread
  static constexpr std::size_t kMisfits = 256;  // in all
  static constexpr std::uint32_t kNone = 0;
  static constexpr std::uint32_t kYes = 1;
  static constexpr std::uint32_t kNo = 2;
  static constexpr std::uint32_t kShut = 0;
  static constexpr std::uint32_t kOpen = 1;
  bool (*fits_)();
  std::vector<std::thread> misfits_;
  std::atomic<std::uint32_t> answer_{kNone};
  std::atomic<std::uint32_t> gate_{kShut};
};

}  // namespace torch_spheres
