#include "py_batch.h"

#include "helper.h"

namespace torch_spheres::bindings {

namespace {

std::string in_seconds(double seconds) {
  std::string text = std::to_string(seconds);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text + " s";
}

}  // namespace

Timeout::Timeout(const std::string& what, double seconds, const std::string& way_out)
    : std::runtime_error(what + " " + in_seconds(seconds) + way_out) {}

void PyBatch::wait(Seconds timeout) const {
  if (timeout && !(*timeout >= 0)) {
    throw std::invalid_argument("timeout must be None or at least 0 seconds, got " +
                                py::repr(py::float_(*timeout)).cast<std::string>());
  }
  if (!batch_->done()) {
    if (getpid() != process_) throw std::runtime_error(std::string("wait()") + kForked);
    if (const auto system = system_.lock(); system && system->on_own_thread()) {
      throw std::runtime_error(
          "wait() called on sphere " + Topology::path_string(System::current()->id) +
          ", from inside a work item, might wait for itself; wait on the thread that submitted the "
          "work");
    }
    const CountedThread waiting(shared_->waiters);
    if (!wait_until_done(timeout)) {
      throw Timeout("the work was not finished after", *timeout, "; it goes on, wait() again");
    }
    check();
    return;
  }
  check();
}

bool PyBatch::wait_until_done(Seconds timeout) const {
  const std::shared_ptr<System> system = system_.lock();
  if (!system) {
    return wait_interruptibly(timeout, [&](Milliseconds time) { return batch_->wait_for(time); });
  }
  if (pace_ && pace_->is_short() && !batch_->done()) {
    Helper helper(*system);
    return wait_interruptibly(timeout,
                              [&](Milliseconds time) { return helper.wait_for(*batch_, time); });
  }
  return wait_interruptibly(timeout, [&](Milliseconds time) {
    if (work_) work_->expect_waiter();
    return system->wait(*batch_, Clock::now() + time);
  });
}

void PyBatch::check() const {
  if (batch_->failed() || batch_->cancelled() > 0) shared_->raised.store(true);
  if (batch_->failed()) {
    if (work_) work_->raise();
    std::rethrow_exception(batch_->error());
  }
  if (batch_->cancelled() > 0) {
    throw StoppedError(std::to_string(batch_->cancelled()) + " of " +
                       std::to_string(batch_->items()) +
                       " work items were not run: the spheres were stopped, or the work cancelled, "
                       "before they began");
  }
}

py::object PyBatch::error() const {
  return work_ && batch_->failed() ? work_->error() : py::none();
}

bool PyBatch::owns_work() const {
  // The batch holds the work, and each copy of the handle both.  With others about, what the work
  // owns is reachable from elsewhere, and the collector must not hear of it from here.
  return work_ && batch_->done() && batch_.use_count() == 1 && work_.use_count() == 2;
}

int PyBatch::traverse(visitproc visit, void* arg) const {
  return owns_work() ? work_->traverse(visit, arg) : 0;
}

void PyBatch::clear() {
  if (owns_work()) work_->clear();
}

}  // namespace torch_spheres::bindings
