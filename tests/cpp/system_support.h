// Work that counts and sums its items, and waits that fail a test instead of hanging it.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "claimer.h"
#include "system.h"

namespace torch_spheres::testing {

/// Whatever takes longer hangs.
inline constexpr Milliseconds kPatience{120'000};

/// Systems of every depth that run one thing at a time, a few, and all; with four levels only one,
/// whose 1885 threads take a while to start, unless there is time.
struct Shape {
  int levels, concurrency;
};
inline std::vector<Shape> shapes() {
  std::vector<Shape> all = {{1, 1}, {2, 1}, {2, 2}, {2, 12}, {3, 1}, {3, 2}, {3, 64}, {4, 8}};
  if (rounds(1) > 1) all.insert(all.end(), {{4, 1}, {4, 2}, {4, 64}});
  return all;
}

class CountingWork final : public Work {
 public:
  explicit CountingWork(std::int64_t chunk = 1,
                        std::function<void(SphereId, std::int64_t)> each = {})
      : chunk_(chunk), each_(std::move(each)) {}
  std::int64_t max_chunk() const override { return chunk_; }
  void run(Claimer& claimer) override {
    Chunk chunk;
    while (claimer.next(chunk)) {
      for (std::int64_t i = 0; i < chunk.count; ++i) {
        const std::int64_t item = chunk.first + i * chunk.stride;
        claimer.ran_of_chunk(i);
        const int now = ++running;
        int most = most_running.load();
        while (now > most && !most_running.compare_exchange_weak(most, now)) {
        }
        const struct Leave {
          std::atomic<int>& running;
          ~Leave() { --running; }
        } leave{running};
        if (each_) each_(claimer.sphere(), item);
        ++count;
        sum += item;
      }
    }
  }

  std::atomic<std::int64_t> count{0};
  std::atomic<std::int64_t> sum{0};
  std::atomic<int> running{0};
  std::atomic<int> most_running{0};

 private:
  const std::int64_t chunk_;
  const std::function<void(SphereId, std::int64_t)> each_;
};

inline std::shared_ptr<Batch> submit(System& system, std::shared_ptr<Work> work,
                                     std::int64_t items) {
  auto batch = std::make_shared<Batch>(std::move(work), items);
  Submitted submitted = Submitted::kFull;
  while ((submitted = system.try_submit(batch)) == Submitted::kFull) {
    system.wait_for_room(Milliseconds(50));
  }
  if (submitted == Submitted::kStopped) throw std::runtime_error("stopped");
  return batch;
}

inline void finish(const std::shared_ptr<Batch>& batch) { CHECK(batch->wait_for(kPatience)); }

inline void check_all_once(const CountingWork& work, std::int64_t items) {
  CHECK_EQ(work.count.load(), items);
  CHECK_EQ(work.sum.load(), items * (items - 1) / 2);
}

inline void stop(System& system) {
  system.request_stop();
  CHECK(system.join_for(kPatience));
}

inline Meeting meet(System& system, int level) {
  std::uint32_t meeting = 0;
  while (meeting == 0) {
    meeting = level < 0 ? system.try_open_epoch() : system.try_open_barrier(level);
    if (meeting == 0) std::this_thread::sleep_for(Milliseconds(1));
  }
  return system.wait_meeting_for(meeting, kPatience);
}

/// Opens once; waiting on it twice is fine.
class Gate {
 public:
  void open() {
    opened_.store(true);
    opened_.notify_all();
  }
  void pass() const { opened_.wait(false); }

 private:
  std::atomic<bool> opened_{false};
};

}  // namespace torch_spheres::testing
