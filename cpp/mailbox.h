// A bounded queue of letters: any thread pushes, any thread pops, first in first out.
//
//     Mailbox<std::unique_ptr<Letter>> box(128);
//     if (!box.try_push(letter)) ...   // full: nothing was stored, the sender decides what to do
//     while (box.try_pop(letter)) ...
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <utility>

namespace torch_spheres {

template <typename T>
class Mailbox {
 public:
  explicit Mailbox(std::size_t capacity) : capacity_(capacity) {}

  bool was_empty() const {
    const std::lock_guard lock(mutex_);
    return values_.empty();
  }
  /// False when full; `value` is moved from only on success.
  bool try_push(T& value) {
    const std::lock_guard lock(mutex_);
    if (values_.size() == capacity_) return false;
    values_.push_back(std::move(value));
    return true;
  }
  bool try_pop(T& value) {
    const std::lock_guard lock(mutex_);
    if (values_.empty()) return false;
    value = std::move(values_.front());
    values_.pop_front();
    return true;
  }

 private:
  const std::size_t capacity_;
  mutable std::mutex mutex_;
  std::deque<T> values_;
};

}  // namespace torch_spheres
