// A bounded lock-free queue of messages: any thread pushes, any thread pops.
//
//     Mailbox<Message> box(64);
//     if (!box.try_push(message)) ...   // full: nothing was stored, the sender decides what to do
//     while (box.try_pop(message)) ...
//
// Any thread: everything.   Capacity: a power of two, at least 2 (with one cell, "holds the value"
// and "free for the next lap" would be the same sequence).
//
// Invariant: a cell's sequence equals the push ticket that may fill it while it is free,
// and that ticket + 1 while it holds the value.
// Ordering: the producer's store of the sequence (release) pairs with the consumer's load of it
// (acquire), and the other way round when the cell is given back; the two tickets need no order of
// their own (relaxed), since a ticket only says which cell to look at.
// Algorithm: D. Vyukov, "Bounded MPMC queue" (1024cores.net).
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace torch_spheres {

/// Atomic: tests put another in its place, which gives other threads a chance at every access.
template <typename T, template <typename> class Atomic = std::atomic>
class Mailbox {
 public:
  explicit Mailbox(std::size_t capacity)
      : mask_(capacity - 1), cells_(std::make_unique<Cell[]>(capacity)) {
    if (!std::has_single_bit(capacity) || capacity == 1) {
      throw std::invalid_argument("a mailbox's capacity must be a power of two, at least 2, got " +
                                  std::to_string(capacity));
    }
    for (std::size_t i = 0; i < capacity; ++i) {
      cells_[i].sequence.store(i, std::memory_order_relaxed);  // before any other thread sees it
    }
  }

  /// True only for the moment in which it was asked.
  bool was_empty() const {
    return head_.load(std::memory_order_acquire) == tail_.load(std::memory_order_acquire);
  }

  /// False when full; `value` is moved from only on success.
  bool try_push(T& value) {
    std::size_t ticket = tail_.load(std::memory_order_relaxed);
    for (;;) {
      Cell& cell = cells_[ticket & mask_];
      const std::size_t sequence = cell.sequence.load(std::memory_order_acquire);
      if (sequence == ticket) {
        if (tail_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_relaxed)) {
          cell.value = std::move(value);
          cell.sequence.store(ticket + 1, std::memory_order_release);
          return true;
        }
      } else if (sequence < ticket) {
        return false;  // the cell still holds the value of one lap ago
      } else {
        ticket = tail_.load(std::memory_order_relaxed);  // another producer was faster
      }
    }
  }
  bool try_push(T&& value) { return try_push(value); }

  bool try_pop(T& value) {
    std::size_t ticket = head_.load(std::memory_order_relaxed);
    for (;;) {
      Cell& cell = cells_[ticket & mask_];
      const std::size_t sequence = cell.sequence.load(std::memory_order_acquire);
      if (sequence == ticket + 1) {
        if (head_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_relaxed)) {
          value = std::move(cell.value);
          cell.sequence.store(ticket + mask_ + 1, std::memory_order_release);
          return true;
        }
      } else if (sequence < ticket + 1) {
        return false;  // nothing there yet
      } else {
        ticket = head_.load(std::memory_order_relaxed);  // another consumer was faster
      }
    }
  }

 private:
  struct Cell {
    Atomic<std::size_t> sequence{0};
    T value{};
  };
  const std::size_t mask_;
  const std::unique_ptr<Cell[]> cells_;
  alignas(64) Atomic<std::size_t> tail_{0};  // next push
  alignas(64) Atomic<std::size_t> head_{0};  // next pop
};

}  // namespace torch_spheres
