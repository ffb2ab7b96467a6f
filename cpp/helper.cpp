#include "helper.h"

#include "claimer.h"

namespace torch_spheres {

bool Helper::wait_for(Batch& batch, Milliseconds timeout) {
  const auto until = std::chrono::steady_clock::now() + timeout;
  if (helps_) {
    if (!run_items(batch, timeout)) return batch.done();
    end();  // all items are taken: the permit is for others
  }
  return system_.wait(batch, until);
}

bool Helper::try_begin() {
  if (system_.topology().levels() == 1) return false;  // the root is the leaf that does it
  system_.threads_.fetch_add(1);
  // In this order: between join_for() and the end of the next start() one of the two says no.  Not
  // when the root must get to a meeting: one helper after the other could keep it from there for
  // ever.
  if (!system_.stopping() && system_.running() && !system_.calls(0) &&
      system_.turns_.permits.try_acquire()) {
    if (!system_.root_taken_.exchange(true)) return true;
    system_.turns_.permits.release();
    system_.dispatch();
  }
  system_.thread_leaves();
  return false;
}

/// True: no item is left to take; false: the time is over.
bool Helper::run_items(const Batch& batch, Milliseconds time) {
  WorkRing& ring = system_.ring_;
  Slot& slot = ring.slot_of(batch);
  if (!WorkRing::enter(slot)) return true;
  if (slot.batch.get() != &batch) {  // it was done, and the next one stands there
    system_.leave(slot, 0);
    return true;
  }
  const auto until = now_ns() + static_cast<std::uint64_t>(std::chrono::nanoseconds(time).count());
  Claimer claimer(ring, slot, 0, Route::from_the_last(ring.leaves()), system_.leaf_counters_.data(),
                  system_.sphere(0).counters, until);
  claimer.record_with(system_.recorder_here());
  system_.run_work(slot, claimer);
  const bool more = claimer.had_work();
  system_.close_if_empty(claimer);
  system_.leave(slot, claimer.finished());
  return !more;
}

void Helper::end() {
  if (!helps_) return;
  helps_ = false;
  system_.root_taken_.store(false);
  // seq_cst, like Sphere::arrive_if_ready(): either the root finds itself not taken or its call is
  // seen.
  if (system_.calls(0)) system_.sphere(0).parker.wake();
  system_.turns_.permits.release();
  system_.dispatch();
  system_.thread_leaves();
}

}  // namespace torch_spheres
