// One sphere: a thread, its mailbox, its inbox for users, its state and its counters.
//
// The thread's loop: read messages; run work if it was given a turn; arrive at a barrier if one is
// asked for and the own queue is empty; otherwise sleep.  Everything that others may want to know
// or change is atomic; the rest stands under "owner only".
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "mailbox.h"
#include "park.h"
#include "stats.h"
#include "topology.h"
#include "trace.h"
#include "work_queue.h"

namespace torch_spheres {

class System;

/// What the runtime tells its spheres.  Messages travel along edges only.
enum class MessageKind : std::uint8_t {
  kWork,           ///< down: batches have been published that have items for your subtree
  kGradientReady,  ///< up: gradients of my whole subtree are there
  kBarrier,        ///< down: spheres of level `level` meet
  kEpochEnd,       ///< down: finish what you have; up: my subtree has finished
  kEpochBegin,     ///< down: the epoch barrier is open again
  kStop,           ///< down: leave
};

struct Message {
  MessageKind kind = MessageKind::kStop;
  std::int8_t level = 0;
  SphereId source = kNoSphere;
  std::uint32_t meeting = 0;
  std::uint64_t sent = 0;  // now_ns(), for a trace; 0: nobody traced
};

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

/// Messages of which those of one meeting at a time are under way (see System::try_open_barrier).
inline bool is_of_meeting(MessageKind kind) {
  return kind == MessageKind::kBarrier || kind == MessageKind::kEpochEnd ||
         kind == MessageKind::kEpochBegin;
}

/// Changes the state of a sphere, and records that the one before has ended.   Owner.
template <template <typename> class Atomic>
void change_state(BasicStateClock<Atomic>& clock, BasicRecorder<Atomic>& recorder, State state) {
  const EndedState ended = clock.transition(state);
  // Either this sees the trace that begins now, or the trace sees this state (Tracer::begin).
  if (ended.end == 0 || !recorder.on_after_store()) return;
  recorder.record({ended.begin, ended.end, -1, 1, static_cast<std::int16_t>(state),
                   TraceKind::kState, static_cast<std::uint8_t>(ended.state)});
}

class Sphere {
 public:
  /// At most 41 messages wait at once.  From above: one kWork, kBarrier, kEpochEnd, kEpochBegin and
  /// kStop (each is sent again only after it was handled, see System).  From each of twelve
  /// children: one kGradientReady, and a kEpochEnd for each of two meetings, since a child that
  /// looked just before an epoch was aborted reports all the same, though the next may be open by
  /// then.
  static constexpr std::size_t kMailboxCapacity = 64;
  static constexpr std::size_t kInboxCapacity = 128;

  Sphere(System& system, SphereId id);

  /// The thread's whole life.
  void run();
  /// See System::pause.   Owner.
  void pause();

  const SphereId id;
  const std::int32_t offset;  // its leaf number, if it is one
  const bool is_leaf;
  const Siblings siblings;

  Parker parker;
  Mailbox<Message> mailbox{kMailboxCapacity};
  Mailbox<std::unique_ptr<Letter>> inbox{kInboxCapacity};
  StateClock clock;
  WorkCounters counters;
  SharedCounter messages_sent;
  SharedCounter messages_received;
  OwnerCounter queue_high_water;  // written by who hands work down: the parent's thread
  Recorder recorder;              // of its own thread
  /// The kernel's number of its thread, 0 before the first.
  std::atomic<std::int64_t> native_id{0};

  /// A kWork message waits in the mailbox: no second one is needed.
  std::atomic<bool> doorbell{false};
  /// A permit was handed to this leaf, or a helper works as the root, or the sphere stands at a
  /// barrier: nobody gives it another turn.  Leaves and the root only.
  std::atomic<bool> busy{false};
  /// The permit that came with `busy`.
  std::atomic<bool> granted{false};
  /// Whether the leaf is in an item or has paused in it, and whether it has been called back.
  std::atomic<Presence> presence{Presence::kHere};
  /// It must get to a meeting: wake it, though somebody else has taken all its items, or once the
  /// helper is gone.
  std::atomic<bool> insists{false};
  /// Complete sets of gradients of this subtree that the parent has not read yet.
  std::atomic<std::uint32_t> gradients_ready{0};
  std::thread thread;

 private:
  void enter(State state);
  void trace_message(TraceKind kind, const Message& message);
  bool has_turns() const { return is_leaf || id == 0; }
  bool read_messages();
  void handle(const Message& message);
  void pass_down(Message message);
  void hand_down();
  void begin_meeting(const Message& message);
  void arrive_if_ready();
  void stand();
  void leave_meeting();
  void epoch_reported(std::uint32_t meeting);
  void count_gradients(const Message& message);
  void take_turn();
  bool run_available();
  void ask_for_turn();

  // Owner only.
  System& system_;
  std::uint64_t seen_ticket_ = 0;  // inner: batches below it have been handed down
  bool work_deferred_ = false;     // inner: kWork read while standing at a barrier
  std::uint32_t meeting_ = 0;      // the meeting it must go to, 0: none
  bool meeting_is_epoch_ = false;
  std::uint64_t called_at_ = 0;      // batches below this ticket come before the meeting
  bool standing_ = false;            // it has arrived there
  std::uint32_t epoch_reports_ = 0;  // children that reported for meeting_
  std::array<std::uint32_t, kKissing> gradients_from_{};
};

}  // namespace torch_spheres
