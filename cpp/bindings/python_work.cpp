#include "python_work.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "topology.h"

namespace torch_spheres::bindings {

namespace {

/// Python's own switch interval: how long a C-only loop may keep others waiting.
constexpr std::uint64_t kSwitchNs = 5'000'000;
constexpr std::uint64_t kShortWaitNs = 10'000;

/// repr(object) in at most 100 characters; never fails.
py::object shown(const py::object& object) {
  // What calls Python code has no Python object beside it: before 3.14 a thread that comes too late
  // is unwound, and letting go of one would need the interpreter.
  PyObject* text = call_or_stay([&] { return PyObject_Repr(object.ptr()); });
  if (text == nullptr) {
    PyErr_Clear();
    return py::str(std::string("<") + Py_TYPE(object.ptr())->tp_name +
                   " object whose repr() failed>");
  }
  auto whole = py::reinterpret_steal<py::object>(text);
  if (PyUnicode_GetLength(text) <= 100) return whole;
  const auto begin = py::reinterpret_steal<py::object>(PyUnicode_Substring(text, 0, 97));
  return py::reinterpret_steal<py::object>(PyUnicode_FromFormat("%U...", begin.ptr()));
}

}  // namespace

PythonWork::PythonWork(py::object fn, py::tuple items, py::object results)
    : fn_(std::move(fn)),
      items_(std::move(items)),
      results_(std::move(results)),
      unfinished_(static_cast<std::int64_t>(py::len(items_))) {}

PythonWork::~PythonWork() { drop(fn_, items_, results_, error_); }

void PythonWork::run(Claimer& claimer) {
  if (!claimer.had_work()) return;  // before the GIL: most visits find nothing
#if !defined(Py_GIL_DISABLED)
  // Whoever submits usually waits right after, and lets go of the GIL: not worth a sleep.
  if (now_ns() < submitted_at_ + kShortWaitNs) {
    static Luck luck;
    spin_until(luck, kShortWaitNs, [this] { return awaited_.load(std::memory_order_relaxed); });
  }
#endif
  claimer.may_take_long();
#if !defined(Py_GIL_DISABLED)
  // Whoever is at short items will have done them before another thread has the GIL.
  static Luck luck;
  spin_until(luck, kShortWaitNs,
             [&] { return inside_.load(std::memory_order_relaxed) == 0 || !claimer.had_work(); });
  if (!claimer.had_work()) return;
#endif
  SphereGil gil;
  const CountedThread here(inside_);
  // Nothing is taken before: others may have done it all by now, and nobody has to wait for that.
  Chunk chunk;
  if (claimer.next(chunk)) call_or_stay([&] { run_items(claimer, chunk, gil); });
}

/// GIL held.  Runs the items of a chunk, and takes more until nothing is left.
void PythonWork::run_items(Claimer& claimer, Chunk& chunk, SphereGil& gil) {
  std::uint64_t last_switch = claimer.begun();
  std::int64_t ran = 0;
  do {
    if (claimer.begun() - last_switch > kSwitchNs) {
      gil.yield();
      last_switch = now_ns();
      claimer.begin_items(last_switch);
    }
    for (std::int64_t i = 0; i < chunk.count; ++i) {
      const std::int64_t item = chunk.first + i * chunk.stride;
      PyObject* argument = PyTuple_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(item));
      PyObject* result = PyObject_CallOneArg(fn_.ptr(), argument);
      if (result == nullptr) {
        claimer.ran_of_chunk(i + 1);  // it did run, and the note on the error is not its own
        record_error(item, claimer.sphere());
        throw std::runtime_error("a Python work item raised an exception");
      }
      if (results_.is_none()) {
        Py_DECREF(result);
      } else {
        PyList_SetItem(results_.ptr(), static_cast<Py_ssize_t>(item), result);
      }
    }
    ran += chunk.count;
  } while (claimer.next(chunk));
  // The last to finish lets go of the function and the items, before anybody hears that the batch
  // is done: a function that owns its own spheres would keep them, and itself, alive otherwise.
  // acq_rel: the calls of all others come before.
  if (unfinished_.fetch_sub(ran, std::memory_order_acq_rel) == ran) {
    let_go(fn_, items_);
  }
}

void PythonWork::record_error(std::int64_t item, SphereId sphere) {
  py::error_already_set raised;  // takes the pending exception
  py::object error = raised.value();
  if (raised.trace()) PyException_SetTraceback(error.ptr(), raised.trace().ptr());
  py::object first;
  bool is_first = false;
  {
    const std::lock_guard lock(error_mutex_);
    is_first = !error_;
    if (is_first) error_ = error;
    first = error_;
  }
  if (is_first || !first.is(error)) add_note(first, error, item, sphere);
}

void PythonWork::add_note(const py::object& first, const py::object& error, std::int64_t item,
                          SphereId sphere) const {
  const py::object argument = shown(py::reinterpret_borrow<py::object>(
      PyTuple_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(item))));
  // One exception is raised, the first; the others are not to vanish.
  const bool also = !first.is(error);
  const py::object other = also ? shown(error) : py::object(py::str());
  const std::string path = Topology::path_string(sphere);
  const auto note = py::reinterpret_steal<py::object>(PyUnicode_FromFormat(
      "%s%U%sraised by work item %lld (%U) on sphere %s (id %d)", also ? "also: " : "", other.ptr(),
      also ? " " : "", static_cast<long long>(item), argument.ptr(), path.c_str(),
      static_cast<int>(sphere)));
  PyObject* added =
      call_or_stay([&] { return PyObject_CallMethod(first.ptr(), "add_note", "O", note.ptr()); });
  // An exception class may have an add_note of its own: the error is worth more than the note.
  if (added == nullptr) PyErr_Clear();
  Py_XDECREF(added);
}

int PythonWork::traverse(visitproc visit, void* arg) const {
  Py_VISIT(fn_.ptr());
  Py_VISIT(items_.ptr());
  Py_VISIT(results_.ptr());
  Py_VISIT(error_.ptr());
  return 0;
}

void PythonWork::clear() {
  // Out of the members first: what goes away here may run code that comes back.
  const py::object fn = std::move(fn_), items = std::move(items_), error = std::move(error_);
  const py::object results = std::exchange(results_, py::none());
}

void PythonWork::raise() {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error_.ptr())), error_.ptr());
  throw py::error_already_set();
}

NativeWork::~NativeWork() { drop(owner_); }

void NativeWork::run(Claimer& claimer) {
  Chunk chunk;
  const std::int64_t* values = values_.empty() ? nullptr : values_.data();
  std::uint64_t longest = 0;
  for (bool more = true; more;) {
    more = claimer.next(chunk);
    longest = std::max(longest, claimer.chunk_ns());
    if (!more) break;
    for (std::int64_t i = 0, item = chunk.first; i < chunk.count; ++i, item += chunk.stride) {
      pointer_(context_, values == nullptr ? item : values[item]);
    }
  }
  if (longest != 0) pace_->saw(longest);
}

}  // namespace torch_spheres::bindings
