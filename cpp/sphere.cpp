#include "sphere.h"

#include <pthread.h>

#include <algorithm>
#include <string>

#include "claimer.h"
#include "system.h"

namespace torch_spheres {

namespace {

Siblings siblings_of(SphereId id, std::int32_t offset) {
  if (id == 0) return {0, 1, 1};
  const std::int32_t step = Topology::count(Topology::level(id) - 1);
  return {offset - Topology::group(id) * step, step, kKissing};
}

void name_this_thread(SphereId id) {
  // The kernel keeps 15 characters; "sphere 11.11.11" has exactly that many.
  const std::string name = "sphere " + Topology::path_string(id);
#if defined(__linux__)
  pthread_setname_np(pthread_self(), name.c_str());
#elif defined(__APPLE__)
  pthread_setname_np(name.c_str());
#endif
}

}  // namespace

Sphere::Sphere(System& system, SphereId sphere_id)
    : id(sphere_id),
      offset(Topology::offset(sphere_id)),
      is_leaf(system.topology().is_leaf(sphere_id)),
      siblings(siblings_of(sphere_id, offset)),
      system_(system) {}

void Sphere::run() {
  name_this_thread(id);
  native_id.store(native_thread_id());  // seq_cst: with the load in Tracer::begin
  if (recorder.on_after_store()) {
    recorder.record({now_ns(), now_ns(), native_id.load(), 1, 0, TraceKind::kThread, 0});
  }
  enter(State::kReady);
  work_deferred_ = standing_ = false;
  meeting_ = 0;
  gradients_from_ = {};
  while (!system_.stopping()) {
    bool progress = read_messages();
    if (granted.load(std::memory_order_acquire)) {
      take_turn();
      progress = true;
    }
    arrive_if_ready();
    if (progress || system_.stopping()) continue;
    enter(standing_ ? State::kWaiting : State::kIdle);
    parker.park();
    enter(State::kReady);
  }
  read_messages();
  pass_down({MessageKind::kStop, 0, id, 0});
  enter(State::kTerminating);
}

/// Every change of state of a sphere goes through here.
void Sphere::enter(State state) { change_state(clock, recorder, state); }

void Sphere::trace_message(TraceKind kind, const Message& message) {
  if (message.sent == 0 || message.source == kNoSphere) return;
  recorder.record(
      {message.sent, now_ns(), -1, 1, static_cast<std::int16_t>(message.source), kind, 0});
}

bool Sphere::read_messages() {
  bool any = false;
  Message message;
  while (mailbox.try_pop(message)) {
    messages_received.add(1);
    handle(message);
    // Afterwards: what handling it passed on is counted before it is counted off.
    if (is_of_meeting(message.kind)) system_.meeting_messages_.fetch_sub(1);
    any = true;
  }
  return any;
}

void Sphere::handle(const Message& message) {
  switch (message.kind) {
    case MessageKind::kWork:
      trace_message(TraceKind::kWork, message);
      doorbell.exchange(false);  // before looking, so that what comes now rings again
      if (standing_) {
        work_deferred_ = true;
      } else {
        hand_down();
      }
      return;
    case MessageKind::kGradientReady:
      trace_message(TraceKind::kGradient, message);
      count_gradients(message);
      return;
    case MessageKind::kBarrier:
    case MessageKind::kEpochEnd:
      if (message.source == Topology::parent(id) || message.source == kNoSphere) {
        begin_meeting(message);
      } else {
        epoch_reported(message.meeting);
      }
      return;
    case MessageKind::kEpochBegin:
      pass_down(message);  // the rest is for arrive_if_ready(), which sees that the barrier is open
      return;
    case MessageKind::kStop:
      return;  // run() sees that the system is stopping, and passes it down
  }
}

void Sphere::pass_down(Message message) {
  if (is_leaf) return;
  message.source = id;
  for (int group = 0; group < kKissing; ++group) {
    system_.post(Topology::child(id, group), message);
  }
}

/// Passes news of work to the children whose subtrees have items in the batches not seen yet.
void Sphere::hand_down() {
  if (is_leaf) return;  // its parent has marked it ready already
  const std::uint64_t newest = system_.ring_.newest();
  std::int64_t most = 0;
  for (const Slot* slot : system_.ring_.in_flight(newest)) {
    if (slot->ticket.load(std::memory_order_relaxed) < seen_ticket_) continue;
    most = std::max(most, slot->items.load(std::memory_order_relaxed));
  }
  seen_ticket_ = newest;
  std::int64_t waiting = 0;  // in the queues of leaves
  std::int64_t marked = 0;
  for (int group = 0; group < kKissing; ++group) {
    Sphere& child = system_.sphere(Topology::child(id, group));
    if (child.offset >= most) continue;
    if (child.is_leaf) {
      const std::int64_t queued = system_.ring_.was_queued(child.offset);
      child.queue_high_water.raise_to(static_cast<std::uint64_t>(queued));
      if (queued == 0) continue;  // its siblings were faster than this message
      system_.permits_.mark_ready(child.offset);
      waiting += queued;
      ++marked;
    }
    system_.ring_doorbell(id, child.id);
  }
  if (marked == 0) return;
  // Batches of few items all wait in the queues of the first leaves.  Each item may have to run
  // beside the others, so as many leaves get a turn, to steal.
  for (int group = 0; group < kKissing && marked < waiting; ++group) {
    Sphere& child = system_.sphere(Topology::child(id, group));
    if (child.offset < most && system_.ring_.was_queued(child.offset) > 0) continue;
    system_.permits_.mark_ready(child.offset);
    ++marked;
  }
  system_.dispatch();
}

void Sphere::begin_meeting(const Message& message) {
  const bool is_epoch = message.kind == MessageKind::kEpochEnd;
  const int level = Topology::level(id);
  const int goal = is_epoch ? system_.topology().leaf_level() : message.level;
  if (level < goal) {
    pass_down(message);
    if (!is_epoch) return;
  }
  // A new meeting is called only after the last one was released, which this sphere may have slept
  // through.
  leave_meeting();
  epoch_reports_ = 0;
  meeting_ = message.meeting;
  called_at_ = system_.called_at_.load();
  meeting_is_epoch_ = is_epoch;
}

/// The meeting is over: on with the work that came meanwhile.
void Sphere::leave_meeting() {
  meeting_ = 0;
  insists.store(false);
  if (!standing_) return;
  standing_ = false;
  if (has_turns()) busy.store(false);
  if (is_leaf) {
    if (system_.ring_.had_work(siblings)) ask_for_turn();
  } else if (work_deferred_) {
    work_deferred_ = false;
    hand_down();
  }
}

/// A child's subtree has finished the epoch.
void Sphere::epoch_reported(std::uint32_t meeting) {
  // A report cannot overtake the call, which came through this sphere; one from a meeting that was
  // aborted is for nobody.
  if (meeting == meeting_) ++epoch_reports_;
}

void Sphere::arrive_if_ready() {
  if (meeting_ == 0) return;
  Barrier& barrier = system_.barrier_;
  if (barrier.was_released(meeting_)) {
    leave_meeting();
    return;
  }
  if (standing_) return;
  if (!is_leaf && meeting_is_epoch_ && epoch_reports_ < kKissing) return;
  if (has_turns()) {
    // From here on nobody gives it a turn, or helps as the root; if somebody just has, that comes
    // first: take_turn() ends at the meeting, and a helper sees `insists` and wakes the root.
    insists.store(true);
    if (busy.exchange(true)) return;
    if (is_leaf && system_.ring_.had_own_work(offset, called_at_)) {
      busy.store(false);
      ask_for_turn();
      return;
    }
    insists.store(false);
  }
  stand();
}

/// Comes to the meeting; leaves and the root are busy until it is over.
void Sphere::stand() {
  Barrier& barrier = system_.barrier_;
  standing_ = true;
  if (!meeting_is_epoch_) {
    if (barrier.arrive(meeting_)) system_.open_barrier(meeting_, Topology::level(id));
  } else if (id != 0) {
    system_.post(Topology::parent(id), {MessageKind::kEpochEnd, 0, id, meeting_});
  } else {
    system_.epochs_.fetch_add(1);  // first, for those who have seen the release
    if (!barrier.release(meeting_)) system_.epochs_.fetch_sub(1);
    pass_down({MessageKind::kEpochBegin, 0, id, meeting_});
    system_.tell_news();
  }
  parker.wake();  // look again before sleeping: the meeting may be over already
}

void Sphere::count_gradients(const Message& message) {
  Sphere& child = system_.sphere(message.source);
  gradients_from_[static_cast<std::size_t>(Topology::group(child.id))] +=
      child.gradients_ready.exchange(0);
  for (;;) {
    for (std::uint32_t count : gradients_from_) {
      if (count == 0) return;
    }
    for (std::uint32_t& count : gradients_from_) --count;
    system_.report_gradients(*this);
  }
}

/// Runs what there is, with the permit that came along, then lets the next one have it.
void Sphere::take_turn() {
  granted.store(false, std::memory_order_relaxed);  // ours: nobody grants while busy
  insists.store(false);
  // Work that never ends must not keep it from a meeting: it looks for the call after each pass,
  // and goes there with the turn, since others would only give it the next one. By then it has
  // made a pass since it knows of the meeting, which left nothing of its own from before the call.
  while (run_available() && !system_.stopping() && !system_.calls_together()) {
  }
  enter(State::kReady);
  if (meeting_ != 0 && !system_.barrier_.was_released(meeting_)) {
    system_.permits_.release();
    system_.dispatch();
    stand();
    return;
  }
  busy.store(false);
  system_.permits_.release();
  // Work published for this leaf while it was still busy was not offered to it; seq_cst with
  // dispatch(), which looks at `busy` after the work was published.
  if (system_.ring_.had_work(siblings)) system_.permits_.mark_ready(offset);
  system_.dispatch();
}

/// As a Parker does: a call that comes first is kept, and what was published before it is seen
/// afterwards.
void Sphere::pause() {
  Presence seen = Presence::kHere;
  if (presence.compare_exchange_strong(seen, Presence::kPaused)) {
    const State before = clock.state();
    enter(State::kReady);
    enter(State::kWaiting);
    system_.permits_.release();
    // An item that this leaf would have taken after its own is for an idle sibling.
    if (system_.ring_.had_work(siblings)) system_.permits_.mark_ready(offset);
    system_.dispatch();
    // (kStop wakes it, and then it waits for no permit: a leaf that has just left may have one.)
    while (!granted.load(std::memory_order_acquire) && !system_.stopping()) parker.park();
    granted.store(false, std::memory_order_relaxed);  // ours: nobody else grants while busy
    enter(State::kReady);
    enter(before);
  }
  presence.exchange(Presence::kHere);
  // A message may have come with one of the wakes: run() reads it after the turn, before it sleeps.
}

/// One pass over the batches in flight, oldest first, or those from before the meeting that it is
/// called to; true if it found anything to do.
bool Sphere::run_available() {
  bool any = false;
  WorkRing& ring = system_.ring_;
  for (Slot* slot : ring.in_flight(meeting_ != 0 ? called_at_ : WorkRing::kNoLimit)) {
    if (!WorkRing::enter(*slot)) continue;
    Claimer claimer(ring, *slot, id, offset, siblings, system_.leaf_counters_.data(), counters);
    claimer.record_with(&recorder);
    if (claimer.had_work()) {
      enter(State::kReady);
      enter(slot->batch->work()->state());
      system_.run_work(*slot, claimer);
    }
    any = any || claimer.took_any();
    if (ring.leave(*slot, claimer.finished())) system_.tell_news();
  }
  return any;
}

void Sphere::ask_for_turn() {
  system_.permits_.mark_ready(offset);
  system_.dispatch();
}

}  // namespace torch_spheres
