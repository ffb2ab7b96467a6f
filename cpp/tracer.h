// The one trace that a system may be recording: rings for its spheres, and for other threads that
// hand it work, help it or compute shards, as they come along.
//
// Any thread: recorder.   One at a time, whoever: begin, end.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "trace.h"

namespace torch_spheres {

class Sphere;
class WorkRing;

class Tracer {
 public:
  using Spheres = std::vector<std::unique_ptr<Sphere>>;

  bool on() const { return on_.load(std::memory_order_relaxed); }

  /// False if a trace is being recorded already.  Otherwise it begins with as many items in the
  /// queues as count_queued() says when all threads record.
  bool begin(Spheres& spheres, std::size_t capacity,
             const std::function<std::int64_t()>& count_queued);
  TraceRecord end(Spheres& spheres);

  /// For a thread that is no sphere's; null if nothing is being recorded.
  Recorder* recorder_here();

 private:
  /// Shared by the trace and the thread, of which either may be the first to go.
  struct Guest {
    explicit Guest(std::size_t capacity) : ring(capacity) {}
    Recorder recorder;
    TraceRing ring;
    TraceTrack track;
    std::uint64_t thread = 0;
  };

  // on() is a hint, hence relaxed; rings are handed over by Recorder, the rest under the mutex, but
  // for number_, which is stored before on_ (release) and loaded after it (acquire).
  std::atomic<bool> on_{false};
  std::atomic<std::uint64_t> number_{0};  // of the trace, among all of the process
  std::mutex mutex_;                      // guards what follows
  std::size_t capacity_ = 0;
  TraceRecord record_;
  std::vector<std::unique_ptr<TraceRing>> rings_;  // of the spheres
  std::vector<std::shared_ptr<Guest>> guests_;
};

}  // namespace torch_spheres
