// One sphere: a thread, its mailbox for users, its state and its counters.
//
// The thread's loop: see whether the spheres are called together; run work if it was given a turn;
// arrive at the meeting if nothing of before it is left; otherwise look for a moment, and sleep.
// Everything that others may want to know or change is atomic; the rest stands under "owner only".
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "claimer.h"
#include "mailbox.h"
#include "park.h"
#include "stats.h"
#include "topology.h"
#include "trace.h"
#include "work_queue.h"

namespace torch_spheres {

class System;

/// Of a leaf that may pause in the middle of an item.
enum class Presence : std::uint8_t {
  kHere,    ///< it has its permit
  kPaused,  ///< it sleeps, without one
  kCalled,  ///< it goes on as soon as there is one, or does not fall asleep
};

/// What users send each other; the core only carries it.
class Letter {
 public:
  virtual ~Letter() = default;
};

/// Changes the state of a sphere, and records that the one before has ended.   Owner.
template <template <typename> class Atomic>
void change_state(BasicStateClock<Atomic>& clock, BasicRecorder<Atomic>& recorder, State state) {
  const EndedState ended = clock.transition(state);
  // Either this sees the trace that begins now, or the trace sees this state (Tracer::begin).
  if (ended.end == 0 || !recorder.on_after_store()) return;
  recorder.record({ended.begin, ended.end, -1, 1, static_cast<std::int16_t>(state),
                   TraceKind::kState, static_cast<std::uint8_t>(ended.state)});
}

class alignas(64) Sphere final : private Claimer::Looker {
 public:
  static constexpr std::size_t kInboxCapacity = 128;

  Sphere(System& system, SphereId id);

  /// The thread's whole life.
  void run();
  /// See System::pause.   Owner.
  void pause();

  const SphereId id;
  const std::int32_t offset;  // its leaf number, if it is one
  const bool is_leaf;

  Parker parker;
  /// A permit was handed to this leaf.
  std::atomic<bool> granted{false};
  /// Whether the leaf is in an item or has paused in it, and whether it has been called back.
  std::atomic<Presence> presence{Presence::kHere};
  /// Who granted the last turn and when, for a trace; written before `granted` (release).
  SphereId woken_by = kNoSphere;
  std::uint64_t woken_at = 0;

  Mailbox<std::unique_ptr<Letter>> inbox{kInboxCapacity};
  StateClock clock;
  WorkCounters counters;
  SharedCounter messages_sent;
  SharedCounter messages_received;
  Recorder recorder;  // of its own thread
  /// The kernel's number of its thread, 0 before the first.
  std::atomic<std::int64_t> native_id{0};
  std::thread thread;

 private:
  void enter(State state);
  void wake_children();
  void look_at_meeting();
  void arrive_if_ready();
  void leave_meeting();
  bool leave_idle();
  void take_turn();
  bool run_available();
  void stop_looking();
  void finds_out_later(Claimer& claimer) override;
  void found(Claimer& claimer) override;
  void rest();

  // Owner only.
  System& system_;
  std::uint32_t seen_meeting_ = 0;  // the newest that it knows of
  std::uint32_t meeting_ = 0;       // the meeting it must go to, 0: none
  bool standing_ = false;           // it has arrived there
  bool in_idle_ = false;            // it is among the idle leaves, or somebody took it from there
  bool looks_ = false;              // it got the turn to look
  bool found_ = false;              // it has run something in this turn
};

}  // namespace torch_spheres
