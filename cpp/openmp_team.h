// The calling thread's OpenMP threads, put to sleep while spheres need their cores.
//
//     caller:  HeldTeam team(functions, threads);   a parallel region begins; its other threads
//              ... the spheres work ...              sleep at a gate
//              team.release();                       the gate opens; the region ends
//
// A thread of GNU's OpenMP that has done its part of a region spins for 3 ms in case another one
// follows, and a sphere that was woken meanwhile waits for the core.  In a region that has work for
// it the thread does not spin; here the work is to sleep.  (Ending the threads instead has the
// caller's next kernel make new ones, and the caller spins for those: 8 ms each time that the
// kernel of the system places one on the caller's own core.)
//
// Owner only: everything but wait_at_gate, which the team's other threads run.
//
// Ordering: the gate's store releases and the sleepers' load acquires, so they see how many they
// are; who passes last wakes the owner, who does not end the region, for which it would spin,
// before it knows that all are awake.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "platform.h"

namespace torch_spheres {

/// Of the OpenMP library that torch uses: the ABI of GNU's, which LLVM's has too.
struct OpenMp {
  void (*start)(void (*work)(void*), void* data, unsigned threads);  // GOMP_parallel_start
  void (*end)();                                                     // GOMP_parallel_end
  int (*team_size)();                                                // omp_get_num_threads
};

class HeldTeam {
 public:
  HeldTeam(const OpenMp& openmp, unsigned threads)
      : openmp_(openmp), fork_generation_(fork_generation()) {
    openmp_.start(&wait_at_gate, this, threads);
  }
  ~HeldTeam() { release(); }
  HeldTeam(const HeldTeam&) = delete;
  HeldTeam& operator=(const HeldTeam&) = delete;

  /// Only the first one does something.
  void release() {
    if (gate_.load(std::memory_order_relaxed) == kOpen) return;
    // (The library may have given fewer threads than it was asked for.)
    others_ = static_cast<std::uint32_t>(openmp_.team_size() - 1);
    gate_.store(kOpen, std::memory_order_release);
    // A child that was forked in the region has none of the others: it stays in the region, in
    // which its kernels run on one thread.
    if (fork_generation_ != fork_generation()) return;
    wake_all(gate_);
    for (;;) {
      const std::uint32_t seen = passed_.load(std::memory_order_acquire);
      if (seen == others_) break;
      wait_on(passed_, seen);
    }
    std::this_thread::yield();  // lets one that was woken on this core come to the region's end
    openmp_.end();
  }

 private:
  static void wait_at_gate(void* data) {
    auto& team = *static_cast<HeldTeam*>(data);
    while (team.gate_.load(std::memory_order_acquire) != kOpen) wait_on(team.gate_, kShut);
    // (The team stays until the region has ended, and with it this call.)
    const std::uint32_t passed = team.passed_.fetch_add(1, std::memory_order_acq_rel) + 1;
    if (passed == team.others_) wake_one(team.passed_);
  }

  static constexpr std::uint32_t kShut = 0;
  static constexpr std::uint32_t kOpen = 1;
  const OpenMp openmp_;
  const std::uint64_t fork_generation_;
  std::atomic<std::uint32_t> gate_{kShut};
  std::atomic<std::uint32_t> passed_{0};
  std::uint32_t others_ = 0;  // written before the gate opens
};

}  // namespace torch_spheres
