// Distributed batches of work items, and how leaves take from them.
//
// A batch of n items is never split into queue nodes.  Leaf j of L owns the items j, j+L, j+2L, ...
// of every batch: a *slice*, of which a cursor (cursor.h) says what is left.  A leaf's queue is its
// slices of the batches in flight, oldest first; owner and thief both take with one fetch_add, so
// nothing is pushed or popped per item and there is no ABA.
//
// The batches in flight stand in a ring of kBatchesInFlight slots; a submitter that finds its slot
// taken waits (back-pressure).  Slots are never freed, so a thief may look at a stale one.
//
//     submitter:  ring.publish(batch)                        (one at a time: caller's mutex)
//     leaf:       Visit visit(slot); while (claimer.next(chunk)) run(chunk);
//
// Invariant (pending): slot.pending = items not yet finished or cancelled + visitors inside.  It
// goes from 0 to n only in publish, and a visitor enters only by raising it from non-zero, so a
// slot that is visited is not recycled, and exactly one thread brings pending back to 0: that
// thread completes the batch.
// Ordering: publish stores pending (release) after everything else; entering is an acquire RMW of
// it, so a visitor sees the batch whole.  Leaving is a release RMW; the last one to leave acquires,
// so the completing thread, and whoever it tells, sees the effects of every item.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "cursor.h"
#include "stats.h"
#include "topology.h"
#include "trace.h"

namespace torch_spheres {

inline constexpr std::size_t kBatchesInFlight = 64;
/// A slice's cursor has 32 bits for the position; one is kept free for failed claims past the end.
inline constexpr std::int64_t kMaxItemsPerLeaf = std::int64_t{1} << 31;

/// Items first, first + stride, ... (count of them), taken by one sphere to run in this order.
struct Chunk {
  std::int64_t first = 0;
  std::int64_t stride = 1;
  std::int64_t count = 0;
};

class Claimer;

/// What to do with the items of a batch.  One object serves all spheres that take part.
class Work {
 public:
  virtual ~Work() = default;
  /// Runs on a sphere's thread: `while (claimer.next(chunk)) ...` until it says false.  An
  /// exception ends the hand-out of the batch; see Claimer::ran_of_chunk.
  virtual void run(Claimer& claimer) = 0;
  /// Items that may be taken at once when they are fast; 1 makes every item stealable.
  virtual std::int64_t max_chunk() const { return 1; }
  virtual State state() const { return State::kProcessing; }
  /// What a trace calls the items.
  virtual TraceLabel label() const { return TraceLabel::kPython; }
};

/// The submitter's view of a batch: shared with the ring until the batch is complete.
class Batch {
 public:
  Batch(std::shared_ptr<Work> work, std::int64_t items) : work_(std::move(work)), items_(items) {}

  const std::shared_ptr<Work>& work() const { return work_; }
  std::int64_t items() const { return items_; }

  bool done() const { return done_.load(std::memory_order_acquire); }
  template <typename Rep, typename Period>
  bool wait_for(std::chrono::duration<Rep, Period> timeout) {
    std::unique_lock lock(mutex_);
    return finished_.wait_for(lock, timeout, [this] { return done(); });
  }

  /// An item has failed; done() comes when those that run are finished.
  bool was_failing() const { return erred_.load(std::memory_order_relaxed); }

  // Meaningful once done():
  bool failed() const { return error_ != nullptr; }
  std::exception_ptr error() const { return error_; }
  /// Items that were not run, because of an error or of stop().
  std::int64_t cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

 private:
  friend class Claimer;
  friend class WorkRing;
  friend class System;
  const std::shared_ptr<Work> work_;
  const std::int64_t items_;
  std::uint64_t ticket_ = 0;        // written in publish, for the thread that submitted it
  std::atomic<bool> erred_{false};  // set once: by the first error, before stop() or after
  std::atomic<bool> stopped_{false};
  std::atomic<std::int64_t> cancelled_{0};
  std::exception_ptr error_;  // written by the thread that set erred_, read after done_
  std::atomic<bool> done_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
};

/// One place in the ring.
struct Slot {
  alignas(64) std::atomic<std::int64_t> pending{0};
  /// Ticket + 1 of the batch inside; 0 while the slot is free.
  std::atomic<std::uint64_t> ticket_plus_one{0};
  std::atomic<std::int64_t> items{0};
  std::shared_ptr<Batch> batch;  // written in publish and by the completing thread only
  std::unique_ptr<Cursor[]> cursors;

  /// Items of one leaf's slice that nobody has taken yet.
  std::int64_t was_left(std::int32_t leaf) const {
    return cursors[static_cast<std::size_t>(leaf)].was_left();
  }
};

/// Who a sphere steals from: leaves base, base + step, ... base + 11 * step (itself among them).
struct Siblings {
  std::int32_t base = 0;
  std::int32_t step = 1;
  std::int32_t count = 1;
};

/// A leaf's counters that claims touch.
struct WorkCounters {
  OwnerCounter items_run;
  OwnerCounter items_stolen;
  ItemTimes item_times;                              // but for pieces of gradient sums
  std::array<OwnerCounter, kKissing> stolen_from{};  // items_stolen by the owner's group
  alignas(64) SharedCounter items_given;
};

/// The batches in flight.   Any thread: all but publish, which wants one caller at a time.
class WorkRing {
 public:
  explicit WorkRing(std::int32_t leaves) : leaves_(leaves) {}

  std::int32_t leaves() const { return leaves_; }
  std::uint64_t oldest() const { return oldest_.load(); }
  std::uint64_t newest() const { return tail_.load(); }
  bool was_full() const {
    return slots_[tail_.load() % kBatchesInFlight].ticket_plus_one.load() != 0;
  }
  /// The slot of a ticket if that batch is still in flight.
  Slot* find(std::uint64_t ticket) {
    Slot& slot = slots_[ticket % kBatchesInFlight];
    return slot.ticket_plus_one.load(std::memory_order_acquire) == ticket + 1 ? &slot : nullptr;
  }
  const Slot* find(std::uint64_t ticket) const {
    const Slot& slot = slots_[ticket % kBatchesInFlight];
    return slot.ticket_plus_one.load(std::memory_order_acquire) == ticket + 1 ? &slot : nullptr;
  }

  /// Puts a batch (items > 0) into flight; false when its slot is still taken.
  bool publish(const std::shared_ptr<Batch>& batch) {
    const std::uint64_t ticket = tail_.load();
    Slot& slot = slots_[ticket % kBatchesInFlight];
    if (slot.ticket_plus_one.load(std::memory_order_acquire) != 0) return false;
    if (!slot.cursors) slot.cursors = std::make_unique<Cursor[]>(std::size_t(leaves_));
    const std::int64_t n = batch->items();
    for (std::int32_t leaf = 0; leaf < leaves_; ++leaf) {
      const std::int64_t count = n > leaf ? (n - leaf + leaves_ - 1) / leaves_ : 0;
      slot.cursors[static_cast<std::size_t>(leaf)].fill(count);
    }
    batch->ticket_ = ticket;
    slot.batch = batch;
    slot.items.store(n, std::memory_order_relaxed);
    // The ticket first: a late visitor of the slot's last batch may enter, and even complete this
    // one, as soon as pending is not zero, and completing takes the ticket away.
    slot.ticket_plus_one.store(ticket + 1, std::memory_order_release);
    slot.pending.store(n, std::memory_order_release);
    // seq_cst: pairs with the load of newest() by a leaf that has just given up its turn.
    tail_.store(ticket + 1);
    return true;
  }

  /// True if the caller is now a visitor, who must call leave().
  static bool enter(Slot& slot) {
    std::int64_t pending = slot.pending.load(std::memory_order_relaxed);
    while (pending != 0) {
      if (slot.pending.compare_exchange_weak(pending, pending + 1, std::memory_order_acquire,
                                             std::memory_order_relaxed)) {
        return true;
      }
    }
    return false;
  }
  /// Leaves with `finished` items done or cancelled; returns the batch if this completed it.  The
  /// caller then tells those who wait for the system; waiters on the batch itself are woken here.
  std::shared_ptr<Batch> leave(Slot& slot, std::int64_t finished) {
    if (slot.pending.fetch_sub(finished + 1, std::memory_order_acq_rel) != finished + 1) return {};
    std::shared_ptr<Batch> batch = std::move(slot.batch);
    slot.ticket_plus_one.store(0, std::memory_order_release);
    std::uint64_t oldest = oldest_.load();
    while (oldest < tail_.load() && find(oldest) == nullptr) {
      if (oldest_.compare_exchange_weak(oldest, oldest + 1)) ++oldest;
    }
    finish(*batch);
    return batch;
  }
  /// For a batch without items, which never goes into flight.
  static void finish(Batch& batch) {
    const std::lock_guard lock(batch.mutex_);
    batch.done_.store(true, std::memory_order_release);
    batch.finished_.notify_all();
  }

  /// Ends the hand-out of a visited batch; returns how many items will never run.
  std::int64_t cancel_rest(Slot& slot) {
    std::int64_t cancelled = 0;
    for (std::int32_t leaf = 0; leaf < leaves_; ++leaf) {
      cancelled += slot.cursors[static_cast<std::size_t>(leaf)].cancel();
    }
    slot.batch->cancelled_.fetch_add(cancelled, std::memory_order_relaxed);
    return cancelled;
  }
  /// Cancels what is left of a batch, or of every batch in flight (null: for stop()); `completed`
  /// is called for each batch that this completes.  Returns how many items will never run.
  template <typename Completed>
  std::int64_t cancel(const Batch* only, Completed completed) {
    std::int64_t all = 0;
    for (Slot& slot : slots_) {
      if (!enter(slot)) continue;
      std::int64_t cancelled = 0;
      if (only == nullptr || slot.batch.get() == only) {
        if (only == nullptr) slot.batch->stopped_.store(true, std::memory_order_relaxed);
        cancelled = cancel_rest(slot);
      }
      all += cancelled;
      if (leave(slot, cancelled)) completed();
    }
    return all;
  }

  /// Whether a leaf's own queue, up to a ticket, has an item that nobody has taken.
  bool had_own_work(std::int32_t leaf, std::uint64_t end) { return had_work({leaf, 1, 1}, end); }
  /// Whether a leaf's own queue, or a sibling's, has one.
  bool had_work(const Siblings& siblings) { return had_work(siblings, tail_.load()); }
  bool had_work(const Siblings& siblings, std::uint64_t end) {
    for (std::uint64_t t = oldest_.load(); t < end; ++t) {
      Slot* slot = find(t);
      if (slot == nullptr) continue;
      for (std::int32_t i = 0; i < siblings.count; ++i) {
        if (slot->was_left(siblings.base + i * siblings.step) > 0) return true;
      }
    }
    return false;
  }
  /// Items waiting in one leaf's queue.
  std::int64_t was_queued(std::int32_t leaf) const {
    std::int64_t queued = 0;
    for (std::uint64_t t = oldest_.load(), end = tail_.load(); t < end; ++t) {
      if (const Slot* slot = find(t)) queued += slot->was_left(leaf);
    }
    return queued;
  }

 private:
  const std::int32_t leaves_;
  std::array<Slot, kBatchesInFlight> slots_;
  alignas(64) std::atomic<std::uint64_t> tail_{0};
  alignas(64) std::atomic<std::uint64_t> oldest_{0};  // no batch below it is in flight
};

}  // namespace torch_spheres
