#include "system.h"

#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

#include "claimer.h"

namespace torch_spheres {

namespace {

thread_local const Sphere* current_sphere = nullptr;
thread_local const System* current_system = nullptr;

std::atomic<std::uint64_t> forks{0};

std::uint64_t fork_generation() {
  // Only counts, so it is safe in the child of a process with many threads.
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}

}  // namespace

System::System(int levels, int concurrency)
    : topology_(levels),
      concurrency_(std::min(concurrency, topology_.leaves())),
      ring_(topology_.leaves()),
      permits_(topology_.leaves(), concurrency_),
      fork_generation_(fork_generation()) {
  if (concurrency < 1) {
    throw std::invalid_argument("concurrency must be at least 1, got " +
                                std::to_string(concurrency));
  }
  ns_per_tick();  // measured from here on
  const auto leaves = static_cast<std::size_t>(topology_.leaves());
  leaf_counters_.resize(leaves);
  leaf_spheres_.resize(leaves);
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
  permits_.reset(concurrency_);
  gradient_rounds_.store(0);
  {
    // Whoever opens a meeting may have begun before the last stop(): its message is drained too, or
    // meeting_messages_ would count it for ever.
    const std::lock_guard lock(meeting_mutex_);
    for (auto& sphere : spheres_) {
      Message old;
      while (sphere->mailbox.try_pop(old)) {
      }
      sphere->doorbell.store(false);
      sphere->busy.store(false);
      sphere->granted.store(false);
      sphere->presence.store(Presence::kHere);
      sphere->insists.store(false);
      sphere->gradients_ready.store(0);
    }
    meeting_messages_.store(0);
  }
  running_.store(true, std::memory_order_release);
  for (auto& sphere : spheres_) {
    {
      const std::lock_guard lock(news_mutex_);
      ++threads_;
    }
    try {
      sphere->thread = std::thread([this, &s = *sphere] { run_sphere(s); });
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

/// Afterwards join_for() does not wait for the calling thread any more.
void System::thread_leaves() {
  const std::lock_guard lock(news_mutex_);
  if (--threads_ == 0) news_.notify_all();
}

void System::request_stop() {
  if (!running()) return;
  {
    const std::lock_guard lock(submit_mutex_);  // after this nothing new is published
    stopping_.store(true);
  }
  trace_queued(-ring_.cancel(nullptr, [this] { tell_news(); }));
  {
    const std::lock_guard lock(meeting_mutex_);  // after this no new meeting is opened
    abort_meeting();
  }
  Message stop{MessageKind::kStop, 0, kNoSphere, 0};
  sphere(0).mailbox.try_push(stop);  // full or not: it looks at stopping_ when it wakes
  sphere(0).parker.wake();
  tell_news();
}

bool System::join_for(Milliseconds timeout) {
  if (!running()) return true;
  {
    std::unique_lock lock(news_mutex_);
    if (!news_.wait_for(lock, timeout, [this] { return threads_ == 0; })) return false;
  }
  for (auto& sphere : spheres_) {
    if (sphere->thread.joinable()) sphere->thread.join();
  }
  running_.store(false, std::memory_order_release);
  return true;
}

bool System::forked() const { return fork_generation_ != fork_generation(); }

const Sphere* System::current() { return current_sphere; }

bool System::is_here(const System* system) { return current_system == system; }

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
    if (topology_.levels() == 1) {  // the root is the leaf and has no parent to hand work down
      sphere(0).queue_high_water.raise_to(static_cast<std::uint64_t>(ring_.was_queued(0)));
    }
  }
  if (topology_.levels() == 1) {
    permits_.mark_ready(0);
    dispatch();
  } else {
    ring_doorbell(kNoSphere, 0);
  }
  return Submitted::kAccepted;
}

bool System::wait_for_room(Milliseconds timeout) {
  return wait_news(timeout, [this] { return stopping() || !ring_.was_full(); });
}

void System::cancel(const std::shared_ptr<Batch>& batch) {
  trace_queued(-ring_.cancel(batch.get(), [this] { tell_news(); }));
}

void System::ring_doorbell(SphereId source, SphereId target) {
  if (sphere(target).doorbell.exchange(true)) return;
  post(target, {MessageKind::kWork, 0, source, 0});
}

void System::post(SphereId target, const Message& message) {
  Message copy = message;
  if (tracing()) copy.sent = now_ns();
  if (message.source != kNoSphere) sphere(message.source).messages_sent.add(1);
  if (is_of_meeting(message.kind)) meeting_messages_.fetch_add(1);
  Sphere& receiver = sphere(target);
  // Room is guaranteed by how each kind is bounded (Sphere::kMailboxCapacity); kStop alone may come
  // on top of a full mailbox of a sphere that is gone or about to look at stopping_ anyway.
  if (!receiver.mailbox.try_push(copy) && !stopping()) {
    std::fprintf(stderr, "torch_spheres: the mailbox of sphere %d overflowed\n", target);
    std::abort();
  }
  // A leaf is woken for work by dispatch(), when it is its turn.
  if (message.kind != MessageKind::kWork || !receiver.is_leaf) receiver.parker.wake();
}

/// Gives free permits to ready leaves.
void System::dispatch() {
  while (permits_.any_ready() && permits_.try_acquire()) {
    Sphere* next = nullptr;
    // Those in the middle of an item come first: others may wait for what they are at.
    if (const std::int32_t back = permits_.pop_returning(); back >= 0) {
      next = leaf_spheres_[static_cast<std::size_t>(back)];
    }
    for (std::int32_t leaf; next == nullptr && (leaf = permits_.pop_ready()) >= 0;) {
      next = candidate(leaf);
    }
    if (next == nullptr) {
      permits_.release();
      continue;
    }
    next->granted.store(true, std::memory_order_release);
    next->parker.wake();
  }
}

/// Who should have the turn that a ready leaf asks for, now marked busy: the leaf itself, or an
/// idle sibling that can steal from it; null if there is nothing to do or nobody to do it.
Sphere* System::candidate(std::int32_t leaf) {
  Sphere& own = *leaf_spheres_[static_cast<std::size_t>(leaf)];
  if (!ring_.had_work(own.siblings)) {
    if (own.insists.load()) own.parker.wake();
    return nullptr;
  }
  if (!own.busy.exchange(true)) return &own;
  for (std::int32_t i = 0; i < own.siblings.count; ++i) {
    const std::int32_t other = own.siblings.base + i * own.siblings.step;
    Sphere& sibling = *leaf_spheres_[static_cast<std::size_t>(other)];
    if (!sibling.busy.load() && !sibling.busy.exchange(true)) return &sibling;
  }
  return nullptr;
}

/// Runs what the claimer takes of a visited batch; an error ends the hand-out of the batch.
// (GCC binds the reference to what pthread_exit() throws to a null pointer.)
[[gnu::no_sanitize("null")]]
void System::run_work(Slot& slot, Claimer& claimer) {
  try {
    slot.batch->work()->run(claimer);
#if defined(__GLIBCXX__)
  } catch (const abi::__forced_unwind&) {
    throw;  // pthread_exit: not ours to stop
#endif
  } catch (...) {
    claimer.fail(std::current_exception());
    // Before the batch can be complete: a barrier that is opened after it is not concerned.
    abort_meeting();
  }
}

// ---- a hand from the thread that waits ----

bool System::try_begin_help() {
  {
    const std::lock_guard lock(news_mutex_);
    // In this order: between join_for() and the end of the next start() one of the two says no.
    if (stopping() || !running()) return false;
    ++threads_;
  }
  // The permit first, and given back last: where the root is the only leaf nobody may have a permit
  // for it and find it busy.  Not when the root must get to a meeting: one helper after the other
  // could keep it from there for ever.
  if (!sphere(0).insists.load() && permits_.try_acquire()) {
    if (!sphere(0).busy.exchange(true)) return true;
    permits_.release();
    dispatch();
  }
  thread_leaves();
  return false;
}

bool System::help(const Batch& batch, Milliseconds time) {
  Slot& slot = ring_.slot_of(batch);
  if (!WorkRing::enter(slot)) return true;
  std::int64_t finished = 0;
  bool more = false;
  if (slot.batch.get() == &batch) {  // or it was done, and the next one stands there
    // From the last leaf down, while those that are woken begin with the first.
    const std::int32_t leaves = topology_.leaves();
    const auto until =
        now_ns() + static_cast<std::uint64_t>(std::chrono::nanoseconds(time).count());
    Claimer claimer(ring_, slot, 0, leaves - 1, {0, 1, leaves}, leaf_counters_.data(),
                    sphere(0).counters, until);
    claimer.record_with(recorder_here());
    run_work(slot, claimer);
    finished = claimer.finished();
    more = claimer.had_work();
  }
  if (ring_.leave(slot, finished)) tell_news();
  return !more;
}

void System::end_help() {
  Sphere& root = sphere(0);
  root.busy.store(false);
  // seq_cst, like arrive_if_ready(): either the root finds itself not busy or `insists` is seen.
  if (root.insists.load()) root.parker.wake();
  permits_.release();
  dispatch();
  thread_leaves();
}

// ---- statistics ----

std::int64_t System::was_queued(SphereId id) const {
  if (topology_.is_leaf(id)) return ring_.was_queued(Topology::offset(id));
  std::int64_t queued = 0;
  for (int group = 0; group < kKissing; ++group) queued += was_queued(Topology::child(id, group));
  return queued;
}

SphereStats System::stats(SphereId id) const {
  SphereStats stats = stats_but_queued(id);
  stats.queued = static_cast<std::uint64_t>(was_queued(id));
  return stats;
}

std::vector<SphereStats> System::stats() const {
  std::vector<SphereStats> all;
  all.reserve(spheres_.size());
  for (const auto& sphere : spheres_) all.push_back(stats_but_queued(sphere->id));
  // Each queue is looked at once, and an inner sphere has just what its children have.
  for (SphereId id = topology_.total() - 1; id >= 0; --id) {
    SphereStats& stats = all[static_cast<std::size_t>(id)];
    if (topology_.is_leaf(id)) stats.queued = static_cast<std::uint64_t>(was_queued(id));
    if (id > 0) all[static_cast<std::size_t>(Topology::parent(id))].queued += stats.queued;
  }
  return all;
}

SphereStats System::stats_but_queued(SphereId id) const {
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
  stats.queue_high_water = s.queue_high_water.get();
  stats.state_ns = s.clock.times();
  return stats;
}

// ---- news ----

// Whoever changes something that others may wait for then read-modify-writes news_waiters_, which
// a waiter does before it looks: so either the waiter sees the change or the teller the waiter.
void System::tell_news() {
  if (news_waiters_.fetch_add(0) == 0) return;
  const std::lock_guard lock(news_mutex_);
  news_.notify_all();
}

}  // namespace torch_spheres
