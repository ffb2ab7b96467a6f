// The hierarchy: all spheres of a tree, what is handed to them and what comes back.
//
//     System system(2, 4);                              // root and twelve leaves, four at once
//     system.start();
//     auto batch = std::make_shared<Batch>(work, 1000);
//     while (system.try_submit(batch) == Submitted::kFull) system.wait_for_room(50ms);
//     while (!batch->wait_for(50ms)) { /* look for Ctrl-C */ }
//
// No call blocks for longer than the time it is given: the caller decides between slices whether
// to go on.  Any thread may call anything, but start, request_stop and join_for want one caller at
// a time, and none of them may come from a sphere's own thread.
//
// Whoever publishes a batch wakes one leaf, which looks for work; when it has taken an item and
// sees more, it wakes the next.  Inner spheres are not woken for work.  See permits.h.
//
// After fork() the child has no sphere threads: forked() says so, and nothing may be called but
// that, running() and what reads figures.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "barrier.h"
#include "permits.h"
#include "sphere.h"
#include "topology.h"
#include "tracer.h"
#include "work_queue.h"

namespace torch_spheres {

enum class Submitted : std::uint8_t { kAccepted, kFull, kStopped };
enum class Sent : std::uint8_t { kDelivered, kFull };
using Milliseconds = std::chrono::milliseconds;

class System {
 public:
  /// concurrency >= 1: leaves that run at once.  Throws std::invalid_argument.
  System(int levels, int concurrency);
  ~System();  // stops and joins

  const Topology& topology() const { return topology_; }
  int concurrency() const { return concurrency_; }

  // ---- life ----
  /// Creates one thread per sphere.  Throws std::system_error, with no thread left, if the system
  /// has no more, or std::bad_alloc.  No-op when running.
  void start();
  bool running() const { return running_.load(std::memory_order_acquire); }
  /// Takes no more work, cancels items that have not begun, opens barriers, sends the spheres home.
  void request_stop();
  bool stopping() const { return stopping_.load(std::memory_order_acquire); }
  /// True once every thread has ended and is joined.
  bool join_for(Milliseconds timeout);
  /// True in a child process of the one that made it, where another thread may have held any lock
  /// of it at the fork().
  bool forked() const;
  /// Called on each sphere's thread before it ends.  Set before start().
  void on_thread_exit(std::function<void()> hook) { thread_exit_hook_ = std::move(hook); }

  /// The sphere whose thread is calling, and its system; null elsewhere.
  static const Sphere* current();
  bool on_own_thread() const;

  // ---- work ----
  /// Hands out a batch; one with no items is complete at once.
  Submitted try_submit(const std::shared_ptr<Batch>& batch);
  bool wait_for_room(Milliseconds timeout);
  /// Waits until then at the longest; true once the batch is done.  Those who have its last items
  /// may be about to finish, so it looks for a moment before it sleeps, if a core is free for that.
  bool wait(Batch& batch, Deadline until);
  /// Items of the batch that have not begun never will; those that run finish.
  void cancel(const std::shared_ptr<Batch>& batch);

  // ---- items that wait for each other ----
  /// In the middle of an item, on its leaf's own thread: lets others have the permit, and sleeps
  /// until somebody calls the leaf back and there is a permit again.  May return without a call, so
  /// ask in a loop for what was waited for; after request_stop() it returns without a permit.
  ///
  /// Items that wait for each other all have to run at once, each on a leaf of its own: siblings
  /// must not have more of them than there are siblings, nor be at a barrier.
  void pause();
  /// Any thread.  A call that comes before the pause has that return at once.
  void call_back(SphereId leaf);

  // ---- meetings ----
  /// Calls the spheres of a level together (after the work they have); 0 when another meeting is
  /// still going on, or the system is stopping.
  std::uint32_t try_open_barrier(int level);
  /// Ends the epoch: all spheres finish their work and report up the tree; then the next begins.
  std::uint32_t try_open_epoch();
  Meeting wait_meeting_for(std::uint32_t meeting, Milliseconds timeout);
  std::uint64_t epochs() const { return epochs_.load(std::memory_order_acquire); }

  // ---- messages between users ----
  /// Throws std::invalid_argument when no edge joins the two.  Moves from the letter if delivered.
  Sent try_send(SphereId source, SphereId target, std::unique_ptr<Letter>& letter);
  std::unique_ptr<Letter> try_receive(SphereId sphere);
  /// Waits until some letter arrived anywhere, or the time is over.
  void wait_for_mail(SphereId sphere, Milliseconds timeout);

  // ---- statistics ----
  /// Of one sphere; what waits in the queues below an inner one is not counted.
  SphereStats stats(SphereId id) const;
  /// Of `top` and all spheres below it; the root's is of the root alone.
  SubtreeTotals subtree_totals(SphereId top) const;
  /// Of all spheres, by id.
  std::vector<SphereStats> stats() const;

  // ---- traces ----
  bool tracing() const { return tracer_.on(); }
  /// Has all threads record what they do, the last `capacity` events of each.  False: they do.
  bool begin_trace(std::size_t capacity);
  TraceRecord end_trace() { return tracer_.end(spheres_); }
  /// Records something else that the calling thread has been doing since `begin`.
  void trace_phase(TraceLabel phase, std::int64_t shard, std::uint64_t begin);
  /// Records that the calling thread takes gradients that were ready on a sphere at `sent`.
  void trace_gradient(SphereId source, std::uint64_t sent);

 private:
  friend class Helper;
  friend class Sphere;
  static constexpr int kAllLevels = -1;  // of an epoch

  Sphere& sphere(SphereId id) { return *spheres_[static_cast<std::size_t>(id)]; }
  const Sphere& sphere(SphereId id) const { return *spheres_[static_cast<std::size_t>(id)]; }
  void dispatch();
  void grant(std::int32_t leaf);
  void wake_level(int level);

  // Meetings: whose number is in the barrier, and whose level and ticket were stored before it.
  std::uint32_t open_meeting(int level);
  void release_meeting(std::uint32_t meeting);
  void abort_meeting();
  bool meets() const { return !barrier_.was_released(barrier_.current()); }
  /// Whether the spheres of a level are called together just now.
  bool calls(int level) const {
    const int called = meeting_level_.load();
    return (called == level || called == kAllLevels) && meets();
  }
  int deepest_called() const {
    const int called = meeting_level_.load();
    return called == kAllLevels ? topology_.leaf_level() : called;
  }

  void run_work(Slot& slot, Claimer& claimer);
  void close_if_empty(Claimer& claimer);
  void tell_called_leaves();
  void leave(Slot& slot, std::int64_t finished);
  void raise_high_water(std::int64_t items);
  void run_sphere(Sphere& sphere);
  void thread_leaves();
  Recorder* recorder_here();
  void trace_queued(std::int64_t more);

  const Topology topology_;
  const int concurrency_;
  const int most_spinners_;
  WorkRing ring_;
  Turns turns_;
  std::atomic<bool> root_taken_{false};  // by a helper, or by the meeting where the root stands
  std::atomic<int> spinners_{0};         // leaves
  std::atomic<bool> waiter_spins_{false};
  Luck leaves_luck_, waiters_luck_;
  Barrier barrier_;
  std::vector<std::unique_ptr<Sphere>> spheres_;
  std::vector<WorkCounters*> leaf_counters_;    // by leaf number
  std::vector<Sphere*> leaf_spheres_;           // by leaf number
  std::unique_ptr<OwnerCounter[]> high_water_;  // by leaf number; written under submit_mutex_
  std::function<void()> thread_exit_hook_;
  Tracer tracer_;
  const std::uint64_t fork_generation_;

  std::atomic<bool> running_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<std::uint64_t> epochs_{0};
  std::atomic<int> meeting_level_{0};
  std::atomic<std::uint64_t> called_at_{0};  // what its spheres finish before: older tickets
  std::atomic<std::int32_t> threads_{0};     // spheres and helpers

  std::mutex submit_mutex_;   // submissions have one order
  std::mutex meeting_mutex_;  // a meeting is called wholly before stop() aborts it, or not at all
  News news_;                 // a batch, a meeting or a thread is done, a letter is there, a stop
};

}  // namespace torch_spheres
