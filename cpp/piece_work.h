// Has spheres run the pieces of a job: a gradient sum's, a gathered batch's.
//
//     auto work = std::make_shared<PieceWork<SumJob>>(job);   // the job lives until the batch is
//     done system.try_submit(std::make_shared<Batch>(work, job.items()));
#pragma once

#include <atomic>
#include <cstdint>

#include "claimer.h"

namespace torch_spheres {

template <typename Job>
class PieceWork final : public Work {
 public:
  explicit PieceWork(const Job& job) : job_(job) {}
  void run(Claimer& claimer) override {
    Chunk chunk;
    while (claimer.next(chunk)) {
      for (std::int64_t i = 0; i < chunk.count; ++i) {
        job_.run_item(chunk.first + i * chunk.stride);
        pieces_done_.fetch_add(1, std::memory_order_relaxed);
      }
    }
  }
  State state() const override { return Job::kState; }
  TraceLabel label() const override { return Job::kLabel; }
  /// A moving figure, to see whether anybody is at it.
  std::int64_t was_done() const { return pieces_done_.load(std::memory_order_relaxed); }

 private:
  const Job& job_;
  std::atomic<std::int64_t> pieces_done_{0};
};

}  // namespace torch_spheres
