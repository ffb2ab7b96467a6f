// The hierarchy as Python sees it: waits that answer Ctrl-C, errors that come back whole, and a
// system that may be dropped, forked or left running at interpreter exit without harm.
#pragma once

#include <pybind11/pybind11.h>
#include <sys/types.h>
#include <unistd.h>

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "python_work.h"
#include "system.h"

namespace torch_spheres::bindings {

/// Python: torch_spheres.StoppedError(RuntimeError).
struct StoppedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// Python: TimeoutError.
struct Timeout : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Seconds = std::optional<double>;

/// Ctrl-C is looked for this often; well within the 100 ms that are promised.
inline constexpr Milliseconds kSlice{40};

/// GIL held.  Calls slice(time) without the GIL until it says true or the timeout is over; raises
/// what a signal handler raises, KeyboardInterrupt for one.
template <typename Slice>
bool wait_interruptibly(Seconds timeout, Slice slice) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    Milliseconds time = kSlice;
    if (timeout) {
      const std::chrono::duration<double> left =
          std::chrono::duration<double>(*timeout) - (std::chrono::steady_clock::now() - start);
      if (left <= kSlice) {
        time = std::max(Milliseconds(0), std::chrono::ceil<Milliseconds>(left));
      }
    }
    bool done = false;
    {
      const py::gil_scoped_release release;
      done = slice(time);
    }
    if (done) return true;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    // A slice may return early, because what woke it was meant for somebody else.
    if (timeout &&
        std::chrono::steady_clock::now() - start >= std::chrono::duration<double>(*timeout)) {
      return false;
    }
  }
}

class PySystem;

/// The handle of one submission.
class PyBatch {
 public:
  PyBatch(const System& system, std::shared_ptr<Batch> batch, std::shared_ptr<PythonWork> work)
      : system_(&system), batch_(std::move(batch)), work_(std::move(work)) {}

  const std::shared_ptr<Batch>& core() const { return batch_; }
  bool done() const { return batch_->done(); }
  /// Whether its error has been raised already, by this handle or another.
  bool was_raised() const { return work_ && work_->was_raised(); }
  /// Raises the first error of its items, StoppedError, or Timeout.
  void wait(Seconds timeout) const;
  /// After wait(): raises what went wrong, if anything did.
  void check() const;
  py::object results() const { return work_ ? work_->results() : py::none(); }

 private:
  const System* system_;  // to be compared, never followed: a handle may outlive its system
  pid_t process_ = getpid();
  std::shared_ptr<Batch> batch_;
  std::shared_ptr<PythonWork> work_;  // null for native work
};

class PySystem {
 public:
  PySystem(int levels, int concurrency);
  ~PySystem();

  System& core() { return *system_; }
  const System& core() const { return *system_; }

  void start();
  /// Returns how many items of unfinished batches were not run.
  std::int64_t stop(Seconds timeout);
  bool running() const { return system_->running() && !system_->forked(); }

  PyBatch submit(py::object fn, py::tuple items, bool collect);
  PyBatch submit_native(const NativeFunction& function, py::object items);
  /// Hands out any core work; waits for room.
  std::shared_ptr<Batch> submit_core(const std::shared_ptr<Work>& work, std::int64_t items,
                                     const char* what);
  void cancel(const PyBatch& batch);
  void wait(Seconds timeout);
  bool barrier(int level, Seconds timeout);
  std::uint64_t epoch(Seconds timeout);
  void send(SphereId source, SphereId target, py::object value);
  py::object receive(SphereId sphere, Seconds timeout);

  /// Posts the news that a leaf's gradients are there; a leaf reports once per sum.
  void gradient_ready(std::int32_t leaf);
  /// All leaves have reported (absent ones too) for one more sum: waits until the root has heard.
  void gradients_complete();
  /// How often start() was called: news sent before the last one is lost.
  std::uint64_t starts() const { return starts_; }

  /// Raises unless the system runs in this process.
  void require_running(const char* what) const;
  /// Raises on a sphere's own thread, where a wait would wait for itself.
  void require_outside(const char* what) const;

 private:
  void meet(std::uint32_t meeting, const char* what, Seconds timeout);
  std::uint32_t open_meeting(const char* what, Seconds timeout, int level);
  void remember(PyBatch batch);
  template <typename Condition>
  void take_out(Condition condition);
  void forget(const std::shared_ptr<Batch>& batch);

  std::unique_ptr<System> system_;
  std::timed_mutex life_mutex_;  // one start or stop at a time; taken without the GIL
  std::atomic<std::uint64_t> starts_{0};
  std::atomic<std::uint64_t> sums_{0};  // complete sets of reports since the last start
  std::mutex outstanding_mutex_;        // taken with the GIL: no batch may be freed under it
  std::deque<PyBatch> outstanding_;  // not waited for yet; finished ones without error are dropped
};

}  // namespace torch_spheres::bindings
