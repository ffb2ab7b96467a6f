// The handle of one submission as Python sees it, and waits that answer Ctrl-C.
#pragma once

#include <pybind11/pybind11.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "gil.h"
#include "python_work.h"
#include "system.h"

namespace torch_spheres::bindings {

/// Python: torch_spheres.StoppedError(RuntimeError).
struct StoppedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// Python: TimeoutError.
struct Timeout : std::runtime_error {
  Timeout(const std::string& what, double seconds, const std::string& way_out = "");
};

using Seconds = std::optional<double>;

/// Ctrl-C is looked for this often; well within the 100 ms that are promised.
inline constexpr Milliseconds kSlice{40};

using Clock = std::chrono::steady_clock;

/// What is left of a timeout that began at `start`.
inline Seconds time_left(Seconds timeout, Clock::time_point start) {
  if (!timeout) return timeout;
  return std::max(0.0, *timeout - std::chrono::duration<double>(Clock::now() - start).count());
}

/// GIL held.  Calls slice(time) without the GIL until it says true or the timeout is over; raises
/// what a signal handler raises, KeyboardInterrupt for one.
template <typename Slice>
bool wait_interruptibly(Seconds timeout, Slice slice) {
  const auto start = Clock::now();
  for (;;) {
    const std::chrono::duration<double> left(time_left(timeout, start).value_or(1));
    const Milliseconds time = left > kSlice ? kSlice : std::chrono::ceil<Milliseconds>(left);
    bool done = false;
    {
      const GilRelease release;
      done = slice(time);
    }
    if (done) return true;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    // A slice may return early, because what woke it was meant for somebody else.
    if (time_left(timeout, start) == 0.0) return false;
  }
}

/// What the child of a fork() is told.
inline constexpr const char* kForked =
    ": these spheres were started before fork(), and their threads live in the parent process "
    "only; "
    "make a new KissingSpheres in the child, or start the process with the 'spawn' or 'forkserver' "
    "method";

/// The handle of one submission.
class PyBatch {
 public:
  /// `work` or `pace` is null: of native work and of Python work.
  PyBatch(const std::shared_ptr<System>& system, std::shared_ptr<Batch> batch,
          std::shared_ptr<PythonWork> work, std::shared_ptr<const Pace> pace)
      : system_(system), batch_(std::move(batch)), work_(std::move(work)), pace_(std::move(pace)) {}

  const std::shared_ptr<Batch>& core() const { return batch_; }
  bool done() const { return batch_->done(); }
  /// Whether what went wrong has reached somebody, through this handle or another.
  bool was_raised() const { return shared_->raised.load(); }
  /// Whether it will: somebody waits for this batch.
  bool is_awaited() const { return waiters() > 0; }
  int waiters() const { return shared_->waiters.load(); }
  /// The first failed item's exception, or None.  GIL held.
  py::object error() const;
  /// False: it was not done in time.  Works along if its items are native and short.
  bool wait_until_done(Seconds timeout) const;
  /// Raises the first error of its items, StoppedError, or Timeout.
  void wait(Seconds timeout) const;
  /// After wait(): raises what went wrong, if anything did.
  void check() const;
  py::object results() const { return work_ ? work_->results() : py::none(); }

  // For Python's garbage collector: an exception that an item raised knows, through its traceback,
  // the frame that waits, and that frame's variables usually know this handle.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  /// Shared by the copies of a handle; flags that carry no data.
  struct Shared {
    std::atomic<int> waiters{0};
    std::atomic<bool> raised{false};
  };
  /// Nobody but the copies of one handle has the work any more.
  bool owns_work() const;

  std::weak_ptr<System> system_;  // a handle may outlive its system
  pid_t process_ = getpid();
  std::shared_ptr<Batch> batch_;
  std::shared_ptr<PythonWork> work_;
  std::shared_ptr<const Pace> pace_;
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace torch_spheres::bindings
