#include "sphere.h"

#include "system.h"

namespace torch_spheres {

Sphere::Sphere(System& system, SphereId sphere_id)
    : id(sphere_id),
      offset(Topology::offset(sphere_id)),
      is_leaf(system.topology().is_leaf(sphere_id)),
      system_(system) {}

void Sphere::run() {
  set_thread_name("sphere " + Topology::path_string(id));  // 15 characters at most
  native_id.store(native_thread_id());                     // seq_cst: with Tracer::begin
  if (recorder.on_after_store()) {
    recorder.record({now_ns(), now_ns(), native_id.load(), 1, 0, TraceKind::kThread, 0});
  }
  enter(State::kReady);
  standing_ = in_idle_ = looks_ = false;
  meeting_ = 0;
  while (!system_.stopping()) {
    look_at_meeting();
    if (granted.load(std::memory_order_acquire)) take_turn();
    arrive_if_ready();
    if (!granted.load(std::memory_order_acquire) && !system_.stopping()) rest();
  }
  wake_children();
  enter(State::kTerminating);
}

/// Every change of state of a sphere goes through here.
void Sphere::enter(State state) { change_state(clock, recorder, state); }

void Sphere::wake_children() {
  if (is_leaf) return;
  for (int group = 0; group < kKissing; ++group) {
    system_.sphere(Topology::child(id, group)).parker.wake();
  }
}

/// Until somebody wakes it; a leaf is among the idle ones from here on.
void Sphere::rest() {
  if (is_leaf && !standing_ && !in_idle_) {
    in_idle_ = true;
    if (const CountedThread spinner(system_.spinners_); spinner.before() < system_.most_spinners_) {
      system_.turns_.awake.add(offset);
      system_.dispatch();
      if (parker.spin(system_.leaves_luck_)) return parker.park();  // which takes the token
      // Somebody who took it from there wakes it; else it moves.
      if (system_.turns_.awake.remove(offset)) system_.turns_.asleep.add(offset);
    } else {
      system_.turns_.asleep.add(offset);
    }
    system_.dispatch();
  }
  enter(standing_ ? State::kWaiting : State::kIdle);
  parker.park();
  enter(State::kReady);
}

/// False: somebody has taken it out, and the turn that it gets comes first.
bool Sphere::leave_idle() {
  if (in_idle_ && !system_.turns_.awake.remove(offset) && !system_.turns_.asleep.remove(offset))
    return false;
  in_idle_ = false;
  return true;
}

// ---- meetings ----

void Sphere::look_at_meeting() {
  const std::uint32_t newest = system_.barrier_.current();
  if (newest == seen_meeting_) return;
  seen_meeting_ = newest;
  // A new meeting is called only after the last one was released, which it may have slept through.
  leave_meeting();
  if (system_.barrier_.was_released(newest)) return;
  const int level = Topology::level(id);
  if (level < system_.deepest_called()) wake_children();
  if (system_.calls(level)) meeting_ = newest;
}

/// The meeting is over: on with the work that came meanwhile, which rest() asks for.
void Sphere::leave_meeting() {
  meeting_ = 0;
  if (!standing_) return;
  standing_ = false;
  if (id == 0) system_.root_taken_.store(false);
}

/// Comes to the meeting, unless work from before it is left, a turn comes first, or a helper works
/// as the root.
void Sphere::arrive_if_ready() {
  if (meeting_ == 0) return;
  if (system_.barrier_.was_released(meeting_)) return leave_meeting();
  if (standing_) return;
  // Whoever takes the last of the work from before wakes all leaves.
  if (is_leaf && (system_.ring_.may_have_work(system_.called_at_.load()) || !leave_idle())) return;
  // The end of the help wakes it.
  if (id == 0 && system_.root_taken_.exchange(true)) return;
  standing_ = true;
  if (system_.barrier_.arrive(meeting_)) system_.release_meeting(meeting_);
}

// ---- work ----

/// Runs what there is, with the permit that came along, then lets the next one have it.
void Sphere::take_turn() {
  granted.store(false, std::memory_order_relaxed);  // ours: nobody grants a leaf that is not idle
  in_idle_ = false;
  looks_ = true;
  found_ = false;
  if (woken_at != 0 && woken_by != kNoSphere && woken_by != id) {
    recorder.record(
        {woken_at, now_ns(), -1, 1, static_cast<std::int16_t>(woken_by), TraceKind::kWork, 0});
  }
  // Work that never ends must not keep it from a meeting, where others would only give it the next
  // turn: it looks for the call after each pass.
  const int level = system_.topology().leaf_level();
  while (run_available() && !system_.stopping() && !system_.calls(level)) {
  }
  enter(State::kReady);
  stop_looking();
  system_.turns_.permits.release();
  system_.dispatch();
}

/// One pass over the batches in flight, oldest first, or those from before the meeting that it is
/// called to; true if it ran anything.
bool Sphere::run_available() {
  bool any = false;
  const std::uint64_t limit = meeting_ != 0 ? system_.called_at_.load() : WorkRing::kNoLimit;
  for (Slot* slot : system_.ring_.open(limit)) {
    if (!WorkRing::enter(*slot)) continue;
    Claimer claimer(system_.ring_, *slot, id, Route(offset, system_.ring_.leaves()),
                    system_.leaf_counters_.data(), counters);
    claimer.record_with(&recorder);
    if (!found_) claimer.tell(this);
    if (claimer.had_work()) {
      enter(State::kReady);
      enter(slot->batch->work()->state());
      system_.run_work(*slot, claimer);
    }
    any = any || claimer.finished() > 0;
    system_.close_if_empty(claimer);
    system_.leave(*slot, claimer.finished());
  }
  return any;
}

void Sphere::stop_looking() {
  if (looks_) system_.turns_.stop_looking();
  looks_ = false;
}

/// It will take of this batch, or find it empty; what else was submitted while it looked needs
/// another one.
void Sphere::finds_out_later(Claimer& claimer) {
  stop_looking();
  if (system_.ring_.may_have_work_beside(claimer.slot())) system_.dispatch();
}

/// If there is more, the next one has to look for it.
void Sphere::found(Claimer& claimer) {
  found_ = true;
  system_.close_if_empty(claimer);
  stop_looking();
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
    system_.turns_.permits.release();
    // An item that this leaf would have taken after its own is for another.
    system_.dispatch();
    // (stop() wakes it, and then it waits for no permit: a leaf that has just left may have one.)
    while (!granted.load(std::memory_order_acquire) && !system_.stopping()) parker.park();
    granted.store(false, std::memory_order_relaxed);  // ours: nobody else grants now
    enter(State::kReady);
    enter(before);
  }
  presence.exchange(Presence::kHere);
  // A meeting may have been called with one of the wakes: run() looks after the turn.
}

}  // namespace torch_spheres
