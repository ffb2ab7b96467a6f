#include "system.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>

#include "allocator.h"
#include "claimer.h"
#include "fitting_thread.h"

namespace torch_spheres {

namespace {

thread_local const Sphere* current_sphere = nullptr;
thread_local const System* current_system = nullptr;

}  // namespace

System::System(int levels, int concurrency)
    : topology_(levels),
      concurrency_(std::min(concurrency, topology_.leaves())),
      // One core is left to whoever hands out work.
      most_spinners_(std::min(
          concurrency_, static_cast<int>(std::max(1U, std::thread::hardware_concurrency())) - 1)),
      ring_(topology_.leaves()),
      turns_(topology_.leaves(), concurrency_),
      fork_generation_(fork_generation()) {
  if (concurrency < 1) {
    throw std::invalid_argument("concurrency must be at least 1, got " +
                                std::to_string(concurrency));
  }
  const auto leaves = static_cast<std::size_t>(topology_.leaves());
  leaf_counters_.resize(leaves);
  leaf_spheres_.resize(leaves);
  high_water_ = std::make_unique<OwnerCounter[]>(leaves);
  for (SphereId id = 0; id < topology_.total(); ++id) {
    spheres_.push_back(std::make_unique<Sphere>(*this, id));
    if (!topology_.is_leaf(id)) continue;
    const auto leaf = static_cast<std::size_t>(sphere(id).offset);
    leaf_counters_[leaf] = &sphere(id).counters;
    leaf_spheres_[leaf] = &sphere(id);
  }
}

System::~System() {
  request_stop();
  while (!join_for(Milliseconds(1000))) {
  }
}

// ---- life ----

void System::start() {
  if (running()) return;
  stopping_.store(false);
  turns_.reset(concurrency_);
  root_taken_.store(false);
  for (auto& sphere : spheres_) {
    sphere->granted.store(false);
    sphere->presence.store(Presence::kHere);
  }
  running_.store(true, std::memory_order_release);
  FittingThreads fitting(main_heap_is_better.load() ? &on_main_heap : nullptr);
  for (auto& sphere : spheres_) {
    threads_.fetch_add(1);
    try {
      sphere->thread = fitting.start([this, &s = *sphere] { run_sphere(s); });
    } catch (const std::exception& error) {  // no more threads, or no memory for one
      thread_leaves();
      const SphereId started = sphere->id;
      request_stop();
      for (SphereId id = 0; id < started; ++id) this->sphere(id).parker.wake();
      while (!join_for(Milliseconds(1000))) {
      }
      const auto* refused = dynamic_cast<const std::system_error*>(&error);
      if (refused == nullptr) throw;
      throw std::system_error(refused->code(), "only " + std::to_string(started) + " of " +
                                                   std::to_string(topology_.total()) +
                                                   " sphere threads could be started");
    }
  }
}

void System::run_sphere(Sphere& sphere) {
  // However it ends, pthread_exit() in a work item included: join_for() waits for all.
  const struct Leaving {
    System& system;
    ~Leaving() { system.thread_leaves(); }
  } leaving{*this};
  current_sphere = &sphere;
  current_system = this;
  sphere.run();
  if (thread_exit_hook_) thread_exit_hook_();
}

/// Afterwards join_for() does not wait for the calling thread any more; a sphere's it joins, and
/// a helper's owner has the system.
void System::thread_leaves() {
  if (threads_.fetch_sub(1) == 1) news_.tell();
}

void System::request_stop() {
  if (!running()) return;
  {
    const std::lock_guard lock(submit_mutex_);  // after this nothing new is published
    stopping_.store(true);
  }
  trace_queued(-ring_.cancel(nullptr, [this] { news_.tell(); }));
  {
    const std::lock_guard lock(meeting_mutex_);  // after this no new meeting is opened
    abort_meeting();
  }
  sphere(0).parker.wake();  // each wakes its children
  news_.tell();
}

bool System::join_for(Milliseconds timeout) {
  if (!running()) return true;
  const auto until = std::chrono::steady_clock::now() + timeout;
  if (!news_.wait(until, [this] { return threads_.load() == 0; })) return false;
  for (auto& sphere : spheres_) {
    if (sphere->thread.joinable()) sphere->thread.join();
  }
  running_.store(false, std::memory_order_release);
  return true;
}

bool System::forked() const { return fork_generation_ != fork_generation(); }

const Sphere* System::current() { return current_sphere; }

bool System::on_own_thread() const { return current_system == this; }

// ---- work ----

Submitted System::try_submit(const std::shared_ptr<Batch>& batch) {
  if (batch->items() > kMaxItemsPerLeaf) {
    throw std::invalid_argument("a batch holds at most 2**31 items, got " +
                                std::to_string(batch->items()));
  }
  {
    const std::lock_guard lock(submit_mutex_);
    if (!running() || stopping()) return Submitted::kStopped;
    if (batch->items() <= 0) {
      WorkRing::finish(*batch);
      return Submitted::kAccepted;
    }
    if (ring_.was_full()) return Submitted::kFull;
    trace_queued(batch->items());  // before anybody can take one
    ring_.publish(batch);
    raise_high_water(batch->items());
  }
  dispatch();
  return Submitted::kAccepted;
}

/// Looks at a leaf's queue only if it may be longer than ever.
void System::raise_high_water(std::int64_t items) {
  const auto most = static_cast<std::uint64_t>(ring_.queued_at_most());
  const auto leaves = static_cast<std::int32_t>(std::min<std::int64_t>(items, ring_.leaves()));
  for (std::int32_t leaf = 0; leaf < leaves; ++leaf) {
    OwnerCounter& high = high_water_[static_cast<std::size_t>(leaf)];
    if (most > high.get()) high.raise_to(static_cast<std::uint64_t>(ring_.was_queued(leaf)));
  }
}

bool System::wait_for_room(Milliseconds timeout) {
  return news_.wait(std::chrono::steady_clock::now() + timeout,
                    [this] { return stopping() || !ring_.was_full(); });
}

bool System::wait(Batch& batch, Deadline until) {
  if (!batch.done() && turns_.permits.was_free() && most_spinners_ > 0 &&
      !waiter_spins_.exchange(true)) {
    spin_until(waiters_luck_, kWaiterSpinNs, [&] { return batch.done(); });
    waiter_spins_.store(false);
  }
  return batch.wait(until);
}

void System::cancel(const std::shared_ptr<Batch>& batch) {
  trace_queued(-ring_.cancel(batch.get(), [this] { news_.tell(); }));
  tell_called_leaves();
}

/// After any change that turns depend on.
void System::dispatch() {
  const auto may_have_work = [this] { return ring_.may_have_work(); };
  for (std::int32_t leaf; (leaf = turns_.next(may_have_work)) >= 0;) grant(leaf);
}

void System::grant(std::int32_t leaf) {
  Sphere& next = *leaf_spheres_[static_cast<std::size_t>(leaf)];
  next.woken_at = tracing() ? now_ns() : 0;
  next.woken_by = on_own_thread() ? current()->id : kNoSphere;
  next.granted.store(true, std::memory_order_release);
  next.parker.wake();
}

/// Runs what the claimer takes of a visited batch; an error ends the hand-out of the batch.
void System::run_work(Slot& slot, Claimer& claimer) {
  try {
    slot.batch->work()->run(claimer);
  } catch (...) {
    const std::exception_ptr error = std::current_exception();
    if (!error) throw;  // pthread_exit(): no C++ exception, and not ours to stop
    claimer.fail(error);
    // Before the batch can be complete: a barrier that is opened after it is not concerned.
    abort_meeting();
  }
}

/// For a visitor: nobody has to look at the batch any more if nothing of it is left to take.
void System::close_if_empty(Claimer& claimer) {
  if (!claimer.had_work() && ring_.close(claimer.slot())) tell_called_leaves();
}

/// A batch is not open any more: leaves that are called together may have waited for that.
void System::tell_called_leaves() {
  if (meets()) wake_level(topology_.leaf_level());
}

void System::leave(Slot& slot, std::int64_t finished) {
  bool was_open = false;
  if (!ring_.leave(slot, finished, &was_open)) return;
  if (was_open) tell_called_leaves();
  news_.tell();
}

// ---- statistics ----

SphereStats System::stats(SphereId id) const {
  const Sphere& s = sphere(id);
  SphereStats stats;
  stats.id = id;
  stats.state = s.clock.state();
  stats.items_run = s.counters.items_run.get();
  stats.items_stolen = s.counters.items_stolen.get();
  stats.items_given = s.counters.items_given.get();
  stats.item_time_ns = s.counters.item_times.total_ns();
  stats.item_time_counts = s.counters.item_times.counts();
  for (std::size_t group = 0; group < kKissing; ++group) {
    stats.stolen_from[group] = s.counters.stolen_from[group].get();
  }
  stats.messages_sent = s.messages_sent.get();
  stats.messages_received = s.messages_received.get();
  if (s.is_leaf) {
    stats.queue_high_water = high_water_[static_cast<std::size_t>(s.offset)].get();
    stats.queued = static_cast<std::uint64_t>(ring_.was_queued(s.offset));
  }
  stats.state_ns = s.clock.times();
  return stats;
}

std::vector<SphereStats> System::stats() const {
  std::vector<SphereStats> all;
  all.reserve(spheres_.size());
  for (const auto& sphere : spheres_) all.push_back(stats(sphere->id));
  for (SphereId id = topology_.total() - 1; id > 0; --id) {
    all[static_cast<std::size_t>(Topology::parent(id))].queued +=
        all[static_cast<std::size_t>(id)].queued;
  }
  return all;
}

SubtreeTotals System::subtree_totals(SphereId top) const {
  SubtreeTotals totals;
  SphereId first = top;
  SphereId last = top;
  for (const std::uint64_t ns : sphere(top).clock.times()) totals.elapsed_ns += ns;
  do {  // level by level: the ids of a level's part are consecutive
    for (SphereId id = first; id <= last; ++id) {
      const Sphere& s = sphere(id);
      const auto spent = s.clock.times();
      ++totals.spheres[static_cast<std::size_t>(s.clock.state())];
      totals.items_run += s.counters.items_run.get();
      totals.items_stolen += s.counters.items_stolen.get();
      totals.busy_ns += spent[static_cast<std::size_t>(State::kProcessing)] +
                        spent[static_cast<std::size_t>(State::kAccumulating)];
      if (s.is_leaf) {
        totals.queued += static_cast<std::uint64_t>(ring_.was_queued(s.offset));
      }
    }
    first = Topology::child(first, 0);
    last = Topology::child(last, kKissing - 1);
  } while (top != 0 && topology_.contains(first));
  return totals;
}

// ---- traces: what is recorded beside what the spheres record themselves ----

bool System::begin_trace(std::size_t capacity) {
  const std::lock_guard lock(submit_mutex_);  // what is counted below is not submitted meanwhile
  return tracer_.begin(spheres_, capacity, [this] {
    std::int64_t queued = 0;
    for (std::int32_t leaf = 0; leaf < topology_.leaves(); ++leaf) queued += ring_.was_queued(leaf);
    return queued;
  });
}

Recorder* System::recorder_here() {
  if (!tracing()) return nullptr;
  if (on_own_thread()) return &sphere(current()->id).recorder;
  return tracer_.recorder_here();
}

void System::trace_queued(std::int64_t more) {
  Recorder* recorder = more != 0 ? recorder_here() : nullptr;
  if (recorder == nullptr) return;
  const std::uint64_t now = now_ns();
  recorder->record({now, now, more, 1, 0, TraceKind::kQueued, 0});
}

void System::trace_phase(TraceLabel phase, std::int64_t shard, std::uint64_t begin) {
  Recorder* recorder = recorder_here();
  if (recorder == nullptr) return;
  recorder->record(
      {begin, now_ns(), shard, 1, 0, TraceKind::kPhase, static_cast<std::uint8_t>(phase)});
}

void System::trace_gradient(SphereId source, std::uint64_t sent) {
  if (Recorder* recorder = recorder_here()) {
    recorder->record(
        {sent, now_ns(), -1, 1, static_cast<std::int16_t>(source), TraceKind::kGradient, 0});
  }
}

}  // namespace torch_spheres
