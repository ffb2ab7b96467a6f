// A batch being gathered: now, with the spheres' help, or by them alone while Python goes on.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings.h"
#include "helper.h"
#include "py_system.h"
#include "row_gather.h"
#include "turn.h"

namespace torch_spheres::bindings {

namespace {

/// Below this a hand-over to other threads costs more than it saves.
constexpr std::size_t kRowsWorthSharing = 256u << 10;

/// Seconds without a piece being copied.  All spheres may be busy with something long, or wait for
/// this very thread: then it copies the rows itself.
constexpr double kPatience = 0.05;

/// The buffer of a contiguous int64 array, for as long as it lives.
py::buffer_info row_numbers_in(const py::buffer& array) {
  py::buffer_info numbers = array.request();
  if (numbers.ndim != 1 || !numbers.item_type_is_equivalent_to<std::int64_t>() ||
      (numbers.size > 1 && numbers.strides[0] != numbers.itemsize)) {
    throw std::invalid_argument("row numbers must be a contiguous array of int64");
  }
  return numbers;
}

/// Owner: one thread at a time; a loader's iterator calls it under its lock.  A second one gets an
/// error instead of a race.
class PyGather {
 public:
  PyGather(const py::sequence& columns, py::object keep) : keep_(std::move(keep)) {
    for (const py::handle item : columns) {
      const auto column = py::cast<py::tuple>(item);
      if (column.size() != 5) {
        throw std::invalid_argument(
            "a column is (row numbers, address of the table, its stride, bytes of a row, address "
            "of the output)");
      }
      const auto& rows = numbers_.emplace_back(row_numbers_in(py::cast<py::buffer>(column[0])));
      work_->add({static_cast<const std::int64_t*>(rows.ptr), static_cast<std::size_t>(rows.size),
                  py::cast<std::uintptr_t>(column[1]), py::cast<std::size_t>(column[2]),
                  py::cast<std::size_t>(column[3]),
                  reinterpret_cast<char*>(py::cast<std::uintptr_t>(column[4]))});
    }
  }
  /// Nobody may write to memory that is gone.
  ~PyGather() { settle(); }

  std::size_t bytes() const { return work_->bytes(); }  // any thread

  void start(const std::shared_ptr<PySystem>& system) {
    const Turn turn(taken_, "Gather");
    begin(system);
  }

  bool done() const {
    const Turn turn(taken_, "Gather");
    return batch_ && batch_->done();
  }

  /// Works along, and answers Ctrl-C.  On a sphere's own thread, on spheres that do not run or do
  /// not come to it, or without any, it copies the rows itself.
  void finish(const std::shared_ptr<PySystem>& system) {
    const Turn turn(taken_, "Gather");
    if (system) begin(system);
    if (batch_ && !system_->core().forked() && !system_->core().on_own_thread()) {
      Helper helper(system_->core());
      const auto look = [&](Milliseconds time) { return helper.wait_for(*batch_, time); };
      for (std::int64_t before = -1; !wait_interruptibly(kPatience, look);) {
        if (!helper.helps() && work_->was_done() == before) break;
        before = work_->was_done();
      }
    }
    const bool copied = batch_ && batch_->done() && batch_->cancelled() == 0;
    settle();
    if (copied) return;
    // What was begun is done once more, which does no harm.
    const GilRelease release;
    work_->run_here();
  }

 private:
  void begin(const std::shared_ptr<PySystem>& system) {
    if (batch_ || bytes() < kRowsWorthSharing || !system->running() ||
        system->core().on_own_thread()) {
      return;
    }
    auto batch = std::make_shared<Batch>(work_, work_->items());
    {
      const GilRelease release;
      if (system->core().try_submit(batch) != Submitted::kAccepted) return;
    }
    // (With the GIL: the system that this was begun on before may go, and it owns Python objects.)
    system_ = system;
    batch_ = std::move(batch);
  }

  /// Afterwards no sphere is at it.
  void settle() {
    // (In the child of a fork there is nobody who could be writing.)
    if (batch_ && !system_->core().forked()) {
      const GilRelease release;
      system_->core().cancel(batch_);
      batch_->wait(kForever);
    }
    batch_.reset();
  }

  mutable std::atomic<bool> taken_{false};
  const std::shared_ptr<GatherWork> work_ = std::make_shared<GatherWork>();
  std::vector<py::buffer_info> numbers_;
  py::object keep_;
  std::shared_ptr<PySystem> system_;  // that has begun
  std::shared_ptr<Batch> batch_;      // null: not started, or finished
};

/// The list may change meanwhile.
py::object row_numbers(py::handle list) {
  if (!PyList_CheckExact(list.ptr())) return py::none();
  // Its items in a tuple of our own: without the GIL another thread may take them out of the list.
  const auto items = py::reinterpret_steal<py::tuple>(PyList_AsTuple(list.ptr()));
  if (!items) throw py::error_already_set();
  const auto size = PyTuple_GET_SIZE(items.ptr());
  if (size == 0) return py::none();
  py::array_t<std::int64_t> numbers(size);
  std::int64_t* out = numbers.mutable_data();
  std::int64_t low = std::numeric_limits<std::int64_t>::max();
  std::int64_t high = std::numeric_limits<std::int64_t>::min();
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = PyTuple_GET_ITEM(items.ptr(), i);
    if (!PyLong_CheckExact(item)) return py::none();
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow != 0) return py::none();
    out[i] = value;
    low = std::min<std::int64_t>(low, value);
    high = std::max<std::int64_t>(high, value);
  }
  return py::make_tuple(numbers, low, high);
}

}  // namespace

void bind_gather(py::module_& module) {
  py::class_<PyGather>(module, "Gather", "Rows to be copied to where they belong in a batch.")
      .def(
          py::init<const py::sequence&, py::object>(), py::arg("columns"), py::arg("keep"),
          "A column is (numbers of its rows, address of the table, bytes from one row of it to the "
          "next, bytes of a row, address of the output), and nothing of it is checked, see "
          "data/tensor_gather.py. What has to stay alive is kept.")
      .def_property_readonly("bytes", &PyGather::bytes, "Of the batch.")
      .def_property_readonly("done", &PyGather::done,
                             "Whether it was started, and the spheres have copied all rows.")
      .def("start", &PyGather::start, py::arg("system"),
           "Has the spheres begin, if it is worth their while; does not wait.")
      .def("finish", &PyGather::finish, py::arg("system") = py::none(),
           "Copies all rows, or waits until the spheres have.");
  module.def("row_numbers", &row_numbers, py::arg("indices"),
             "(array of int64, least, greatest) of a list of plain ints; None for anything else.");
}

}  // namespace torch_spheres::bindings
