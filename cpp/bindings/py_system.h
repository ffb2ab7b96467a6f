// The hierarchy as Python sees it: waits that answer Ctrl-C, errors that come back whole, and a
// system that may be dropped, forked or left running at interpreter exit without harm.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <memory>
#include <mutex>

#include "py_batch.h"
#include "system.h"

namespace torch_spheres::bindings {

class PySystem {
 public:
  /// `starts`: of the system that it replaces.
  PySystem(int levels, int concurrency, std::uint64_t starts);
  /// Stops it, and waits for items that run; after Ctrl-C, which is raised right after, they end by
  /// themselves.
  ~PySystem();

  System& core() { return *system_; }
  const System& core() const { return *system_; }

  void start();
  /// What nobody was told of, and nobody waits for.
  struct Lost {
    std::int64_t items = 0;  // not run
    py::object error;        // the first one's, or None
  };
  Lost stop(Seconds timeout);
  bool running() const { return system_->running() && !system_->forked(); }
  /// Whether its threads are in the process that this one was forked from.
  bool forked() const { return system_->running() && system_->forked(); }

  PyBatch submit(py::object fn, py::tuple items, bool collect);
  PyBatch submit_native(const NativeFunction& function, py::object items);
  /// Hands out any core work; waits for room.
  std::shared_ptr<Batch> submit_core(const std::shared_ptr<Work>& work, std::int64_t items,
                                     const char* what);
  void wait(Seconds timeout);
  int waiters() const { return waiters_.load(); }
  void barrier(int level, Seconds timeout);
  std::uint64_t epoch(Seconds timeout);
  void send(SphereId source, SphereId target, py::object value);
  py::object receive(SphereId sphere, Seconds timeout);
  /// How often start() was called.
  std::uint64_t starts() const { return starts_; }

  /// Raises unless the system runs in this process.
  void require_running(const char* what) const;
  /// Raises on a sphere's own thread, where a wait would wait for itself.
  void require_outside(const char* what) const;

 private:
  static constexpr int kAllLevels = -1;  // an epoch
  void meet(const char* what, Seconds timeout, int level);
  std::uint32_t open_meeting(const char* what, Seconds timeout, int level);
  void remember(PyBatch batch);
  template <typename Condition>
  void take_out(Condition condition);
  void forget(const std::shared_ptr<Batch>& batch);

  std::shared_ptr<System> system_;  // PyBatch waits with it
  std::timed_mutex life_mutex_;     // one start or stop at a time; taken without the GIL
  std::atomic<std::uint64_t> starts_{0};
  std::mutex outstanding_mutex_;     // taken with the GIL: no batch may be freed under it
  std::atomic<int> waiters_{0};      // calls of wait(), which wait for all that is outstanding
  std::deque<PyBatch> outstanding_;  // not waited for yet; finished ones without error are dropped
};

/// Frees the dropped systems whose threads have ended; waits so long for each.  True: none is left.
/// Any thread, with the GIL or without.
bool join_dropped_for(Milliseconds time);

}  // namespace torch_spheres::bindings
