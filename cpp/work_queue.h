// Distributed batches of work items, and how leaves take from them.
//
// A batch of n items is never split into queue nodes.  Leaf j of L owns the items j, j+L, j+2L, ...
// of every batch: a *slice*, of which a cursor (cursor.h) says what is left.  A leaf's queue is its
// slices of the batches in flight, oldest first; owner and thief both take with one fetch_add, so
// nothing is pushed or popped per item and there is no ABA.
//
// The batches in flight stand in kBatchesInFlight slots; a batch takes any free one, so one that
// takes long holds nobody up, and a submitter that finds none waits (back-pressure).  Slots are
// never freed, so a thief may look at a stale one.
//
//     submitter:  ring.publish(batch)                        (one at a time: caller's mutex)
//     leaf:       for (Slot* slot : ring.in_flight(limit))
//                   if (WorkRing::enter(*slot)) { run what a Claimer takes; ring.leave(*slot, n); }
//
// Invariant (pending): slot.pending = items not yet finished or cancelled + visitors inside.  It
// goes from 0 to n only in publish, and a visitor enters only by raising it from non-zero, so a
// slot that is visited is not recycled, and exactly one thread brings pending back to 0: that
// thread completes the batch.
// Ordering: publish stores pending (release) after everything else; entering is an acquire RMW of
// it, so a visitor sees the batch whole.  Leaving is a release RMW; the last one to leave acquires,
// so the completing thread, and whoever it tells, sees the effects of every item.
// Invariant (taken): a slot's bit of taken_ is set before its pending leaves 0, and cleared after
// it is 0 again, by the thread that completed the batch.
// Ordering: publish sets the bit (release) after ticket and cursors, which whoever sees the bit
// (acquire) may therefore read; clearing it (release) pairs with publish, which looks for a free
// slot (acquire).  A reader may see the bit of one batch and the ticket of the slot's next: it is
// told of something newer than it asked for, which is in flight as well.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
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

inline constexpr std::size_t kBatchesInFlight = 64;  // the bits of a word
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
  std::size_t slot_ = 0;            // written in publish, for the thread that submitted it
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
  /// Of the last batch inside: batches have rising tickets.  Relaxed, as `items`: see taken_.
  std::atomic<std::uint64_t> ticket{0};
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
  /// The ticket that the next batch will have.
  std::uint64_t newest() const { return tail_.load(); }
  bool was_full() const { return taken_.load() == ~std::uint64_t{0}; }

  static constexpr std::uint64_t kNoLimit = ~std::uint64_t{0};
  /// Slots of batches in flight, oldest first.
  class InFlight {
   public:
    Slot* const* begin() const { return slots_.data(); }
    Slot* const* end() const { return slots_.data() + count_; }

   private:
    friend class WorkRing;
    void add(Slot& slot, std::uint64_t ticket) {
      std::size_t at = count_++;
      for (; at > 0 && tickets_[at - 1] > ticket; --at) {  // seldom: slots are taken in turn
        tickets_[at] = tickets_[at - 1];
        slots_[at] = slots_[at - 1];
      }
      tickets_[at] = ticket;
      slots_[at] = &slot;
    }
    std::size_t count_ = 0;
    std::array<std::uint64_t, kBatchesInFlight> tickets_;  // as they were when they were looked at
    std::array<Slot*, kBatchesInFlight> slots_;
  };
  /// Those whose tickets are below `end`.
  InFlight in_flight(std::uint64_t end = kNoLimit) {
    InFlight result;
    each_in_flight(end,
                   [&](std::size_t i, std::uint64_t ticket) { result.add(slots_[i], ticket); });
    return result;
  }
  /// Where a batch was put; it may be done, and the next one stand there.
  Slot& slot_of(const Batch& batch) { return slots_[batch.slot_]; }

  /// Puts a batch (items > 0) into flight; false when all slots are taken.
  bool publish(const std::shared_ptr<Batch>& batch) {
    const std::uint64_t ticket = tail_.load(std::memory_order_relaxed);  // written here only
    const std::uint64_t taken = taken_.load(std::memory_order_acquire);
    if (taken == ~std::uint64_t{0}) return false;
    // The first free one behind the last that was taken.
    const std::size_t next = (last_ + 1) % kBatchesInFlight;
    const int busy = std::countr_one(std::rotr(taken, static_cast<int>(next)));
    last_ = (next + static_cast<std::size_t>(busy)) % kBatchesInFlight;
    Slot& slot = slots_[last_];
    if (!slot.cursors) slot.cursors = std::make_unique<Cursor[]>(std::size_t(leaves_));
    const std::int64_t n = batch->items();
    for (std::int32_t leaf = 0; leaf < leaves_; ++leaf) {
      const std::int64_t count = n > leaf ? (n - leaf + leaves_ - 1) / leaves_ : 0;
      slot.cursors[static_cast<std::size_t>(leaf)].fill(count);
    }
    batch->slot_ = last_;
    slot.batch = batch;
    slot.items.store(n, std::memory_order_relaxed);
    slot.ticket.store(ticket, std::memory_order_relaxed);
    // The bit first: a late visitor of the slot's last batch may enter, and even complete this one,
    // as soon as pending is not zero, and completing takes the bit away.  seq_cst: pairs with the
    // load in had_work() by a leaf that has just given up its turn.
    taken_.fetch_or(std::uint64_t{1} << last_);
    slot.pending.store(n, std::memory_order_release);
    tail_.store(ticket + 1);  // last: who hands down what is below it finds it in flight, or done
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
    taken_.fetch_and(~(std::uint64_t{1} << batch->slot_));
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
  bool had_own_work(std::int32_t leaf, std::uint64_t end) const {
    return had_work({leaf, 1, 1}, end);
  }
  /// Whether a leaf's own queue, or a sibling's, has one.
  bool had_work(const Siblings& siblings, std::uint64_t end = kNoLimit) const {
    bool any = false;
    each_in_flight(end, [&](std::size_t slot, std::uint64_t) {
      for (std::int32_t i = 0; i < siblings.count && !any; ++i) {
        any = slots_[slot].was_left(siblings.base + i * siblings.step) > 0;
      }
    });
    return any;
  }
  /// Items waiting in one leaf's queue.
  std::int64_t was_queued(std::int32_t leaf) const {
    std::int64_t queued = 0;
    each_in_flight(kNoLimit,
                   [&](std::size_t slot, std::uint64_t) { queued += slots_[slot].was_left(leaf); });
    return queued;
  }

 private:
  /// In no order: calls see(index of a slot, ticket) for those whose tickets are below `end`.
  template <typename See>
  void each_in_flight(std::uint64_t end, See see) const {
    for (std::uint64_t left = taken_.load(); left != 0; left &= left - 1) {
      const auto slot = static_cast<std::size_t>(std::countr_zero(left));
      const std::uint64_t ticket = slots_[slot].ticket.load(std::memory_order_relaxed);
      if (ticket < end) see(slot, ticket);
    }
  }

  const std::int32_t leaves_;
  std::array<Slot, kBatchesInFlight> slots_;
  std::size_t last_ = kBatchesInFlight - 1;  // slot that was taken last; publish only
  alignas(64) std::atomic<std::uint64_t> tail_{0};
  alignas(64) std::atomic<std::uint64_t> taken_{0};  // a bit for each slot
};

}  // namespace torch_spheres
