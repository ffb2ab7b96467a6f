// Distributed batches of work items, and how leaves take from them.
//
// A batch of n items is never split into queue nodes.  Leaf j of L owns the items j, j+L, j+2L, ...
// of every batch: a *slice*, of which a cursor says what is left.  A leaf's queue is its
// slices of the batches in flight, oldest first; owner and thief both take with one fetch_add, so
// nothing is pushed or popped per item and there is no ABA.
//
// The batches in flight stand in kBatchesInFlight slots; a batch takes any free one, so one that
// takes long holds nobody up, and a submitter that finds none waits (back-pressure).  Slots are
// never freed, so a thief may look at a stale one.
//
//     submitter:  ring.publish(batch)                        (one at a time: caller's mutex)
//     leaf:       for (Slot* slot : ring.open(limit))
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
// Invariant (open): a slot with an item that nobody has taken has its bit in open_ once publish()
// returns.  Only visitors of the slot clear it, when they find nothing left to take, and whoever
// completes a batch; what is taken never comes back.  A bit may be set for longer than that.
// Ordering: publish sets the bits (release) after ticket and cursors, which whoever sees a bit
// (acquire) may therefore read; clearing taken_ (release) pairs with publish, which looks for a
// free slot (acquire).  A reader may see the bit of one batch and the ticket of the slot's next: it
// is told of something newer than it asked for, which is in flight as well.  open_ is seq_cst: it
// is one of the words by which System decides whom to wake.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <exception>
#include <memory>

#include "park.h"
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

  bool done() const { return (state_.load(std::memory_order_acquire) & kDone) != 0; }
  /// Sleeps until done(), or until then.
  bool wait(Deadline until) {
    for (;;) {
      std::uint32_t seen = state_.load(std::memory_order_acquire);
      if ((seen & kDone) != 0) return true;
      if (std::chrono::steady_clock::now() >= until) return false;
      // Whoever finishes it makes a system call only if it finds this bit.
      if (seen == kAwaited || state_.compare_exchange_strong(seen, kAwaited)) {
        wait_on(state_, kAwaited, until);
      }
    }
  }
  template <typename Rep, typename Period>
  bool wait_for(std::chrono::duration<Rep, Period> timeout) {
    return wait(std::chrono::steady_clock::now() + timeout);
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
  std::exception_ptr error_;  // written by the thread that set erred_, read after done()
  static constexpr std::uint32_t kDone = 1;
  static constexpr std::uint32_t kAwaited = 2;
  std::atomic<std::uint32_t> state_{0};
};

/// What is left of one leaf's slice of a batch.   Submitter, alone: fill.   Any thread: the rest.
///
/// Invariant: low half next, high half end; `next` only grows within a batch, and fetch_add hands
/// each value to one thread, so no item is taken twice; end is part of the same word, so what is
/// taken is never judged by another batch's end.
/// Ordering: taking is relaxed, since it only has to hand each position to one thread; what the
/// batch holds was seen on entering its slot, and what the items did is published on leaving it.
template <template <typename> class Atomic>
class alignas(64) BasicCursor {
 public:
  struct Taken {
    std::int64_t first = 0;
    std::int64_t count = 0;
  };

  void fill(std::int64_t count) { word_.store(static_cast<std::uint64_t>(count) << 32); }
  std::int64_t was_left() const { return std::max<std::int64_t>(0, left(word_.load())); }

  /// Takes a quarter of what is left, at least one and at most so many.
  Taken take(std::int64_t at_most) {
    // Looking first keeps exhausted cursors unwritten, and the overshoot of `next` within one
    // max_chunk per sphere, far from the half word's end.
    const std::int64_t seen = left(word_.load(std::memory_order_relaxed));
    if (seen <= 0) return {};
    const std::int64_t want = std::clamp<std::int64_t>(seen / 4, 1, at_most);
    const std::uint64_t old =
        word_.fetch_add(static_cast<std::uint64_t>(want), std::memory_order_relaxed);
    return {next(old), std::clamp<std::int64_t>(left(old), 0, want)};
  }
  /// Nobody takes anything any more; returns how much will never be taken.
  std::int64_t cancel() {
    const auto last = static_cast<std::uint64_t>(end(word_.load()));
    return std::max<std::int64_t>(0, left(word_.exchange((last << 32) | last)));
  }

 private:
  static std::int64_t end(std::uint64_t word) { return static_cast<std::int64_t>(word >> 32); }
  static std::int64_t next(std::uint64_t word) {
    return static_cast<std::int64_t>(word & 0xffffffffu);
  }
  static std::int64_t left(std::uint64_t word) { return end(word) - next(word); }

  Atomic<std::uint64_t> word_{0};
};
using Cursor = BasicCursor<std::atomic>;

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
  /// Of those whose tickets are below `end`, the open ones: some of their items may be to be had.
  InFlight open(std::uint64_t end = kNoLimit) {
    InFlight result;
    each_open(end, [&](std::size_t i, std::uint64_t ticket) { result.add(slots_[i], ticket); });
    return result;
  }
  /// Whether there are any.
  bool may_have_work() const { return open_.load() != 0; }
  bool may_have_work_beside(const Slot& slot) const {
    return (open_.load() & ~bit_of(*slot.batch)) != 0;
  }
  bool may_have_work(std::uint64_t end) const {
    bool any = false;
    each_open(end, [&](std::size_t, std::uint64_t) { any = true; });
    return any;
  }
  /// For a visitor that has found nothing left to take; true if nobody else had.
  bool close(const Slot& slot) {
    const std::uint64_t bit = bit_of(*slot.batch);
    return (open_.load() & bit) != 0 && (open_.fetch_and(~bit) & bit) != 0;
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
    // as soon as pending is not zero, and completing takes the bit away.
    const std::uint64_t bit = bit_of(*batch);
    taken_.fetch_or(bit, std::memory_order_acq_rel);
    slot.pending.store(n, std::memory_order_release);
    tail_.store(ticket + 1);
    open_.fetch_or(bit);
    // Such a visitor has taken a bit away that was not there yet.
    if (slot.pending.load() == 0) open_.fetch_and(~bit);
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
  std::shared_ptr<Batch> leave(Slot& slot, std::int64_t finished, bool* was_open = nullptr) {
    if (slot.pending.fetch_sub(finished + 1, std::memory_order_acq_rel) != finished + 1) return {};
    std::shared_ptr<Batch> batch = std::move(slot.batch);
    const std::uint64_t bit = bit_of(*batch);
    const std::uint64_t open = open_.fetch_and(~bit);
    if (was_open != nullptr) *was_open = (open & bit) != 0;
    taken_.fetch_and(~bit, std::memory_order_acq_rel);
    finish(*batch);
    return batch;
  }
  /// For a batch without items, which never goes into flight.
  static void finish(Batch& batch) {
    // acq_rel: the items' effects come before done(), for those that look and those that are woken.
    const std::uint32_t seen = batch.state_.exchange(Batch::kDone, std::memory_order_acq_rel);
    if (seen == Batch::kAwaited) wake_all(batch.state_);
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

  /// In the longest queue, at most.
  std::int64_t queued_at_most() const {
    std::int64_t queued = 0;
    each_open(kNoLimit, [&](std::size_t slot, std::uint64_t) {
      queued += (slots_[slot].items.load(std::memory_order_relaxed) + leaves_ - 1) / leaves_;
    });
    return queued;
  }
  /// Items waiting in one leaf's queue.
  std::int64_t was_queued(std::int32_t leaf) const {
    std::int64_t queued = 0;
    each_open(kNoLimit,
              [&](std::size_t slot, std::uint64_t) { queued += slots_[slot].was_left(leaf); });
    return queued;
  }

 private:
  /// Of its slot, in taken_ and open_.
  static std::uint64_t bit_of(const Batch& batch) { return std::uint64_t{1} << batch.slot_; }
  /// In no order: calls see(index of a slot, ticket) for those whose tickets are below `end`.
  template <typename See>
  void each_open(std::uint64_t end, See see) const {
    for (std::uint64_t left = open_.load(); left != 0; left &= left - 1) {
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
  alignas(64) std::atomic<std::uint64_t> open_{0};   // the same
};

}  // namespace torch_spheres
