// Forces a race: threads that arrive here leave together.
#pragma once

#include <atomic>
#include <thread>

namespace torch_spheres::testing {

/// Lets all its threads go at the same moment, as often as one likes.
class StartLine {
 public:
  explicit StartLine(int threads) : threads_(threads) {}
  void wait() {
    const int turn = arrived_.fetch_add(1) / threads_;
    while (arrived_.load() / threads_ == turn) std::this_thread::yield();
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
};

}  // namespace torch_spheres::testing
