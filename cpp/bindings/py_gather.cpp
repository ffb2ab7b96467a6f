#include "py_gather.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "helper.h"

namespace torch_spheres::bindings {

namespace {

/// Below this a hand-over to other threads costs more than it saves.
constexpr std::size_t kWorthSharing = 256u << 10;

/// Seconds without a piece being copied.  All spheres may be busy with something long, or wait for
/// this very thread: then it copies the rows itself.
constexpr double kPatience = 0.05;

}  // namespace

PyGather::Numbers::Numbers(const py::buffer& array) : info_(array.request()) {
  if (info_.ndim != 1 || !info_.item_type_is_equivalent_to<std::int64_t>() ||
      (info_.size > 1 && info_.strides[0] != info_.itemsize)) {
    throw std::invalid_argument("row numbers must be a contiguous array of int64");
  }
}

PyGather::PyGather(const py::sequence& columns, py::object keep) : keep_(std::move(keep)) {
  numbers_.reserve(columns.size());
  for (const py::handle item : columns) {
    const auto column = py::cast<py::tuple>(item);
    if (column.size() != 5) {
      throw std::invalid_argument(
          "a column is (row numbers, address of the table, its stride, bytes of a row, address of "
          "the output)");
    }
    numbers_.emplace_back(py::cast<py::buffer>(column[0]));
    const Numbers& rows = numbers_.back();
    job_.add({rows.data(), rows.size(), py::cast<std::uintptr_t>(column[1]),
              py::cast<std::size_t>(column[2]), py::cast<std::size_t>(column[3]),
              reinterpret_cast<char*>(py::cast<std::uintptr_t>(column[4]))});
  }
}

PyGather::~PyGather() { settle(); }

void PyGather::settle() {
  if (!batch_) return;
  // (In the child of a fork there is nobody who could be writing.)
  if (!system_->core().forked()) {
    const GilRelease release;
    system_->core().cancel(batch_);
    while (!batch_->wait_for(Milliseconds(1000))) {
    }
  }
  batch_.reset();
  work_.reset();
}

void PyGather::start(const std::shared_ptr<PySystem>& system) {
  const Turn turn(taken_, "Gather");
  begin(system);
}

void PyGather::begin(const std::shared_ptr<PySystem>& system) {
  if (batch_ || job_.bytes() < kWorthSharing || !system->running() ||
      system->core().on_own_thread()) {
    return;
  }
  auto work = std::make_shared<GatherWork>(job_);
  auto batch = std::make_shared<Batch>(work, job_.items());
  {
    const GilRelease release;
    if (system->core().try_submit(batch) != Submitted::kAccepted) return;
  }
  // (With the GIL: the system that this was begun on before may go, and it owns Python objects.)
  system_ = system;
  batch_ = std::move(batch);
  work_ = std::move(work);
}

bool PyGather::done() const {
  const Turn turn(taken_, "Gather");
  return batch_ && batch_->done();
}

void PyGather::finish(const std::shared_ptr<PySystem>& system) {
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
  job_.run_here();
}

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

}  // namespace torch_spheres::bindings
