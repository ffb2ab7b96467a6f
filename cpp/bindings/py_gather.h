// A batch being gathered: now, with the spheres' help, or by them alone while Python goes on.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "py_system.h"
#include "row_gather.h"
#include "turn.h"

namespace torch_spheres::bindings {

/// Owner: one thread at a time; a loader's iterator calls it under its lock.  A second one gets an
/// error instead of a race.
class PyGather {
 public:
  /// A column is (numbers of its rows, address of the table, bytes from one row of it to the next,
  /// bytes of a row, address of the output). `keep` is what has to live until the rows are copied.
  PyGather(const py::sequence& columns, py::object keep);
  /// Waits for what was started: nobody may write to memory that is gone.
  ~PyGather();
  PyGather(const PyGather&) = delete;
  PyGather& operator=(const PyGather&) = delete;

  std::size_t bytes() const { return job_.bytes(); }  // any thread
  /// Has the spheres begin, if it is worth their while and they can; does not wait.
  void start(const std::shared_ptr<PySystem>& system);
  /// Whether the spheres have copied all rows.
  bool done() const;
  /// Waits until all rows are copied, and works along; answers Ctrl-C.  On a sphere's own thread,
  /// on spheres that do not run or do not come to it, or without any, it copies them itself.
  void finish(const std::shared_ptr<PySystem>& system);

 private:
  /// The buffer of a contiguous int64 array, for as long as it lives.
  class Numbers {
   public:
    explicit Numbers(const py::buffer& array);
    const std::int64_t* data() const { return static_cast<const std::int64_t*>(info_.ptr); }
    std::size_t size() const { return static_cast<std::size_t>(info_.size); }

   private:
    py::buffer_info info_;
  };
  void begin(const std::shared_ptr<PySystem>& system);
  void settle();

  mutable std::atomic<bool> taken_{false};
  GatherJob job_;
  std::vector<Numbers> numbers_;
  py::object keep_;
  std::shared_ptr<PySystem> system_;  // that has begun
  std::shared_ptr<Batch> batch_;      // null: not started, or finished
  std::shared_ptr<GatherWork> work_;  // of the batch
};

/// (array of int64, least, greatest) of a list of plain ints that fit; None for anything else.  The
/// list may change meanwhile.
py::object row_numbers(py::handle list);

}  // namespace torch_spheres::bindings
