// Work items that are Python calls, and those that are calls of C functions.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "claimer.h"
#include "gil.h"

namespace torch_spheres::bindings {

/// fn(item) for each of a list of Python objects.
class PythonWork final : public Work {
 public:
  /// GIL held.  `items` is ours alone; `results`, if given, has as many places.
  PythonWork(py::object fn, py::tuple items, py::object results);
  ~PythonWork() override;

  void run(Claimer& claimer) override;
  // Few: an item can hide behind a slow one of the same chunk, and the cost of a claim is small
  // beside a Python call.
  std::int64_t max_chunk() const override { return 8; }

  /// Somebody waits for it, without the GIL.
  void expect_waiter() { awaited_.store(true, std::memory_order_relaxed); }
  /// GIL held: raises the item's own exception object again.
  [[noreturn]] void raise();
  /// The first failed item's exception, or null.  GIL held, once the batch is done.
  const py::object& error() const { return error_; }
  const py::object& results() const { return results_; }
  /// For Python's garbage collector: what a finished batch keeps alive.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  void run_items(Claimer& claimer, Chunk& chunk, SphereGil& gil);
  void record_error(std::int64_t item, SphereId sphere);
  /// Notes on `first`, the exception that is raised, where `error` came from.
  void add_note(const py::object& first, const py::object& error, std::int64_t item,
                SphereId sphere) const;

  py::object fn_;       // this and items_: null once all items have been run
  py::object items_;    // a tuple
  py::object results_;  // list or None
  std::atomic<std::int64_t> unfinished_;
  const std::uint64_t submitted_at_ = now_ns();
  std::atomic<bool> awaited_{false};  // relaxed, as the next: hints
  std::atomic<int> inside_{0};        // spheres that run items
  std::mutex error_mutex_;            // taken with the GIL: no Python code may run under it
  py::object error_;                  // the first
};

/// How long the items of a native function have taken lately.   Any thread: everything.
class Pace {
 public:
  void saw(std::uint64_t ns) {
    // Relaxed, and one of two that come at once may be lost: it is an estimate.
    const std::uint64_t before = ns_.load(std::memory_order_relaxed);
    ns_.store(std::max(ns, before - before / 8), std::memory_order_relaxed);
  }
  /// Whether a thread that has to answer Ctrl-C and timeouts may run one.
  bool is_short() const {
    const std::uint64_t ns = ns_.load(std::memory_order_relaxed);
    return ns != 0 && ns < kShortNs;
  }

 private:
  static constexpr std::uint64_t kShortNs = 10'000'000;
  std::atomic<std::uint64_t> ns_{0};  // 0: nobody knows
};

/// A C function: void(void* context, int64_t item).  Never touches the GIL.
struct NativeFunction {
  using Pointer = void (*)(void*, std::int64_t);
  Pointer pointer = nullptr;
  void* context = nullptr;
  py::object owner;  // keeps the code and the context alive
  std::shared_ptr<Pace> pace = std::make_shared<Pace>();
};

class NativeWork final : public Work {
 public:
  NativeWork(const NativeFunction& function, std::vector<std::int64_t> values)
      : pointer_(function.pointer),
        context_(function.context),
        values_(std::move(values)),
        owner_(function.owner),
        pace_(function.pace) {}
  ~NativeWork() override;
  void run(Claimer& claimer) override;
  std::int64_t max_chunk() const override { return 256; }
  TraceLabel label() const override { return TraceLabel::kNative; }

 private:
  const NativeFunction::Pointer pointer_;
  void* const context_;
  const std::vector<std::int64_t> values_;  // empty: item k is k itself
  py::object owner_;
  const std::shared_ptr<Pace> pace_;
};

}  // namespace torch_spheres::bindings
