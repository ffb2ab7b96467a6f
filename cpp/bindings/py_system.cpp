#include "py_system.h"

#include <pybind11/stl.h>

#include <utility>
#include <vector>

namespace torch_spheres::bindings {

namespace {

class PyLetter final : public Letter {
 public:
  explicit PyLetter(py::object sent) : value(std::move(sent)) {}
  ~PyLetter() override { drop(value); }
  py::object value;
};

/// In a destructor: what a signal handler raised while that waited is raised right after it.
void raise_later(py::error_already_set& error) {
  auto later = std::make_unique<py::error_already_set>(error);
  const auto raise = [](void* raised) {
    const std::unique_ptr<py::error_already_set> owner(static_cast<py::error_already_set*>(raised));
    owner->restore();
    return -1;
  };
  if (Py_AddPendingCall(raise, later.get()) == 0) {
    (void)later.release();
  } else {
    later->discard_as_unraisable("torch_spheres: waiting for the items of dropped spheres");
  }
}

// Systems that nobody has any more, but whose threads could not be joined.  A stack without a lock,
// which a thread of the parent could hold at a fork().
struct Dropped {
  std::shared_ptr<System> system;
  Dropped* next;
};
std::atomic<Dropped*> all_dropped{nullptr};

void keep_dropped(std::shared_ptr<System> system) {
  auto* node = new Dropped{std::move(system), all_dropped.load(std::memory_order_relaxed)};
  // Releases the node to the exchange (acquire) in join_dropped_for().
  while (!all_dropped.compare_exchange_weak(node->next, node, std::memory_order_release,
                                            std::memory_order_relaxed)) {
  }
}

}  // namespace

bool join_dropped_for(Milliseconds time) {
  bool none_left = true;
  for (Dropped* next = all_dropped.exchange(nullptr, std::memory_order_acquire); next != nullptr;) {
    std::unique_ptr<Dropped> node(std::exchange(next, next->next));
    if (node->system->forked()) {
      (void)node.release();  // its threads are in the parent: nothing to join, nothing to free
    } else if (!node->system->join_for(time)) {
      keep_dropped(std::move(node->system));
      none_left = false;
    }
  }
  return none_left;
}

PySystem::PySystem(int levels, int concurrency, std::uint64_t starts) : starts_(starts) {
  const GilRelease release;
  join_dropped_for(Milliseconds(0));
  system_ = std::make_shared<System>(levels, concurrency);
  system_->on_thread_exit(&SphereGil::leave_thread);
}

PySystem::~PySystem() {
  outstanding_.clear();
  if (system_->forked()) {
    new std::shared_ptr<System>(std::move(system_));  // never freed: see join_dropped_for()
    return;
  }
  system_->request_stop();
  // Not joined are threads that will not get the GIL any more, and none on a sphere's thread: that
  // cannot wait for itself, and two that drop each other's systems would wait for each other.
  if (!ending() && System::current() == nullptr) {
    try {
      wait_interruptibly({}, [this](Milliseconds time) { return system_->join_for(time); });
      return;
    } catch (py::error_already_set& error) {
      raise_later(error);
    }
  }
  keep_dropped(std::move(system_));
}

void PySystem::require_running(const char* what) const {
  if (system_->forked()) {
    throw std::runtime_error(std::string(what) + kForked);
  }
  if (!system_->running()) {
    throw StoppedError(
        std::string(what) +
        ": the spheres are not running; call start(), or use them in a 'with' block");
  }
}

void PySystem::require_outside(const char* what) const {
  if (!system_->on_own_thread()) return;
  throw std::runtime_error(
      std::string(what) + " called on sphere " + Topology::path_string(System::current()->id) +
      ", from inside a work item, would wait for itself; call it from the thread that hands out "
      "the work (distribute_work() does not wait and may be called here)");
}

void PySystem::start() {
  if (system_->forked()) require_running("start()");
  require_outside("start()");
  const GilRelease release;
  const std::lock_guard lock(life_mutex_);
  if (system_->running()) return;
  system_->start();
  // Not before they run: who finds that they were never started calls this too, and waits above.
  starts_.fetch_add(1);
}

PySystem::Lost PySystem::stop(Seconds timeout) {
  if (system_->forked()) require_running("stop()");
  Lost lost{0, py::none()};
  if (!system_->running()) return lost;
  require_outside("stop()");
  std::uint64_t run = 0;
  {
    const GilRelease release;
    const std::lock_guard lock(life_mutex_);
    run = starts_;
    system_->request_stop();
  }
  const bool stopped = wait_interruptibly(timeout, [&](Milliseconds time) {
    const std::unique_lock lock(life_mutex_, time);
    // Another thread may have stopped them as well, and even started them again.
    return lock.owns_lock() && (starts_ != run || system_->join_for(time));
  });
  if (!stopped) {
    throw Timeout("stop(): work items were still running after", *timeout,
                  "; no new ones begin, call stop() again");
  }
  std::deque<PyBatch> ended;
  {
    const std::lock_guard lock(outstanding_mutex_);
    ended.swap(outstanding_);
  }
  if (waiters_.load() > 0) return lost;  // they are told
  for (const PyBatch& batch : ended) {
    if (batch.was_raised() || batch.is_awaited()) continue;
    if (batch.core()->stopped()) lost.items += batch.core()->cancelled();
    if (lost.error.is_none()) lost.error = batch.error();
  }
  return lost;
}

std::shared_ptr<Batch> PySystem::submit_core(const std::shared_ptr<Work>& work, std::int64_t items,
                                             const char* what) {
  require_running(what);
  auto batch = std::make_shared<Batch>(work, items);
  for (;;) {
    Submitted submitted = Submitted::kStopped;
    {
      const GilRelease release;
      submitted = system_->try_submit(batch);
    }
    if (submitted == Submitted::kAccepted) return batch;
    require_running(what);
    if (submitted == Submitted::kStopped) {
      throw StoppedError(std::string(what) + ": the spheres are being stopped");
    }
    if (system_->on_own_thread()) {
      throw std::runtime_error(std::string(what) + " called from inside a work item while " +
                               std::to_string(kBatchesInFlight) +
                               " batches are in flight, the most there can be: waiting for room "
                               "here could wait for ever");
    }
    wait_interruptibly({}, [&](Milliseconds time) { return system_->wait_for_room(time); });
  }
}

PyBatch PySystem::submit(py::object fn, py::tuple items, bool collect) {
  const auto count = static_cast<std::int64_t>(items.size());
  py::object results = py::none();
  if (collect) {
    py::list list(items.size());
    for (std::size_t i = 0; i < items.size(); ++i) list[i] = py::none();
    results = std::move(list);
  }
  auto work = std::make_shared<PythonWork>(std::move(fn), std::move(items), std::move(results));
  auto core = submit_core(work, count, collect ? "map()" : "distribute_work()");
  PyBatch batch(system_, std::move(core), work, nullptr);
  if (!collect) remember(batch);
  return batch;
}

PyBatch PySystem::submit_native(const NativeFunction& function, py::object items) {
  std::vector<std::int64_t> values;
  std::int64_t count = 0;
  if (py::isinstance<py::int_>(items)) {
    count = items.cast<std::int64_t>();
  } else {
    values = items.cast<std::vector<std::int64_t>>();
    count = static_cast<std::int64_t>(values.size());
  }
  auto work = std::make_shared<NativeWork>(function, std::move(values));
  PyBatch batch(system_, submit_core(work, count, "distribute_work()"), nullptr, function.pace);
  remember(batch);
  return batch;
}

void PySystem::remember(PyBatch batch) {
  // Bounded: what is in flight, plus the first batch that failed and has not been waited for.
  bool error_kept = false;
  take_out([&](const PyBatch& old) {
    if (!old.done()) return false;
    return !old.core()->failed() || old.was_raised() || std::exchange(error_kept, true);
  });
  if (batch.done() && !batch.core()->failed()) return;
  const std::lock_guard lock(outstanding_mutex_);
  outstanding_.push_back(std::move(batch));
}

/// Freeing a batch runs Python code (an item's __del__), which may come back here or hand the GIL
/// to a thread that does: so not under the mutex.
template <typename Condition>
void PySystem::take_out(Condition condition) {
  std::vector<PyBatch> taken;
  const std::lock_guard lock(outstanding_mutex_);
  for (auto at = outstanding_.begin(); at != outstanding_.end();) {
    if (condition(*at)) {
      taken.push_back(std::move(*at));
      at = outstanding_.erase(at);
    } else {
      ++at;
    }
  }
}

void PySystem::forget(const std::shared_ptr<Batch>& batch) {
  take_out([&](const PyBatch& old) { return old.core() == batch; });
}

void PySystem::wait(Seconds timeout) {
  if (system_->forked()) require_running("wait()");
  require_outside("wait()");
  const CountedThread waiting(waiters_);
  const auto start = Clock::now();
  for (;;) {
    std::optional<PyBatch> next;
    {
      const std::lock_guard lock(outstanding_mutex_);
      if (outstanding_.empty()) return;
      next = outstanding_.front();
    }
    const auto& core = next->core();
    if (!next->wait_until_done(time_left(timeout, start))) {
      throw Timeout("wait(): work was not finished after", *timeout, "; it goes on, wait() again");
    }
    forget(core);
    if (!next->was_raised()) next->check();  // its handle's wait() may have raised it already
  }
}

std::uint32_t PySystem::open_meeting(const char* what, Seconds timeout, int level) {
  require_running(what);
  require_outside(what);
  std::uint32_t meeting = 0;
  const bool opened = wait_interruptibly(timeout, [&](Milliseconds) {
    meeting = level == kAllLevels ? system_->try_open_epoch() : system_->try_open_barrier(level);
    if (meeting == 0) std::this_thread::sleep_for(Milliseconds(1));
    return meeting != 0 || !system_->running() || system_->stopping();
  });
  if (!opened) {
    throw Timeout(std::string(what) + ": another barrier was still held after", *timeout);
  }
  if (meeting == 0) throw StoppedError(std::string(what) + ": the spheres were stopped");
  return meeting;
}

void PySystem::meet(const char* what, Seconds timeout, int level) {
  const auto start = Clock::now();
  const std::uint32_t meeting = open_meeting(what, timeout, level);
  Meeting outcome = Meeting::kPending;
  wait_interruptibly(time_left(timeout, start), [&](Milliseconds time) {
    outcome = system_->wait_meeting_for(meeting, time);
    return outcome != Meeting::kPending;
  });
  if (outcome == Meeting::kPending) {
    throw Timeout(std::string(what) + ": not all spheres had arrived after", *timeout);
  }
  if (outcome == Meeting::kReleased) return;
  if (system_->stopping() || !system_->running()) {
    throw StoppedError(std::string(what) + ": the spheres were stopped before all had arrived");
  }
  std::optional<PyBatch> failed;
  {
    const std::lock_guard lock(outstanding_mutex_);
    for (const PyBatch& batch : outstanding_) {
      if (!failed && batch.core()->was_failing()) failed = batch;
    }
  }
  if (failed) {
    wait_interruptibly({}, [&](Milliseconds time) { return failed->core()->wait_for(time); });
    forget(failed->core());
    failed->check();
  }
  throw std::runtime_error(std::string(what) +
                           ": given up because a work item failed; its own wait raises the error");
}

void PySystem::barrier(int level, Seconds timeout) { meet("barrier()", timeout, level); }

std::uint64_t PySystem::epoch(Seconds timeout) {
  meet("epoch()", timeout, kAllLevels);
  return system_->epochs();
}

void PySystem::send(SphereId source, SphereId target, py::object value) {
  if (system_->forked()) require_running("send()");
  std::unique_ptr<Letter> letter = std::make_unique<PyLetter>(std::move(value));
  if (system_->try_send(source, target, letter) == Sent::kFull) {
    throw std::overflow_error("send(): the mailbox of sphere " + std::to_string(target) +
                              " is full: " + std::to_string(Sphere::kInboxCapacity) +
                              " messages wait there; receive(" + std::to_string(target) +
                              ") takes them out");
  }
}

py::object PySystem::receive(SphereId sphere, Seconds timeout) {
  system_->topology().require(sphere);
  if (system_->forked()) require_running("receive()");
  std::unique_ptr<Letter> letter = system_->try_receive(sphere);
  if (!letter) {
    const bool got = wait_interruptibly(timeout, [&](Milliseconds time) {
      system_->wait_for_mail(sphere, time);
      letter = system_->try_receive(sphere);
      return letter != nullptr || system_->stopping();
    });
    if (!got) {
      throw Timeout("receive(): no message for sphere " + std::to_string(sphere) + " within",
                    *timeout);
    }
    if (!letter) throw StoppedError("receive(): the spheres were stopped");
  }
  return static_cast<PyLetter&>(*letter).value;
}

}  // namespace torch_spheres::bindings
