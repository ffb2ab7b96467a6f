#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "allocator.h"
#include "bindings.h"
#include "py_system.h"

namespace torch_spheres::bindings {

namespace {

void cancel(PySystem& self, const PyBatch& batch) {
  const GilRelease release;
  self.core().cancel(batch.core());
}

void pause(PySystem& self) {
  {
    const py::gil_scoped_release release;
    self.core().pause();
  }
  if (self.core().stopping()) throw StoppedError("the spheres were stopped");
}

void call_back(PySystem& self, SphereId leaf) {
  const Topology& topology = self.core().topology();
  if (!topology.contains(leaf) || !topology.is_leaf(leaf)) {
    throw std::invalid_argument("there is no leaf " + std::to_string(leaf));
  }
  self.core().call_back(leaf);
}

void begin_trace(PySystem& self, std::size_t capacity) {
  bool begun = false;
  {
    const GilRelease release;
    begun = self.core().begin_trace(capacity);
  }
  if (!begun) {
    throw std::runtime_error(
        "trace(): a trace of these spheres is being recorded already, and there is one at a time; "
        "leave that 'with' block first");
  }
}

TraceRecord end_trace(PySystem& self) {
  const GilRelease release;
  return self.core().end_trace();
}

// Without letting go of the GIL: these only write to the thread's own ring.

void trace_phase(PySystem& self, int label, std::int64_t shard, std::uint64_t begin) {
  if (label < 0 || label >= kTraceLabels) {
    throw std::invalid_argument("there is no trace label " + std::to_string(label));
  }
  if (!self.core().forked()) {
    self.core().trace_phase(static_cast<TraceLabel>(label), shard, begin);
  }
}

void trace_gradient(PySystem& self, SphereId source, std::uint64_t sent) {
  self.core().topology().require(source);
  if (!self.core().forked()) self.core().trace_gradient(source, sent);
}

py::tuple subtrees(const PySystem& self) {
  const System& core = self.core();
  std::uint64_t elapsed = 0;
  py::list all;
  const SphereId last = core.topology().levels() > 1 ? kKissing : 0;
  for (SphereId id = 0; id <= last; ++id) {
    const SubtreeTotals t = core.subtree_totals(id);
    if (id == 0) elapsed = t.elapsed_ns;
    all.append(py::make_tuple(id, py::tuple(py::cast(t.spheres)), t.items_run, t.items_stolen,
                              t.queued, t.busy_ns));
  }
  return py::make_tuple(elapsed, all);
}

}  // namespace

void bind_system(py::module_& module) {
  py::register_exception<StoppedError>(module, "StoppedError", PyExc_RuntimeError).doc() = R"(
      The spheres do not run, or were stopped before they had done what the call waited for.

      Work items that had begun were finished, the others were not run. `KissingSpheres.start`
      starts the spheres again.)";
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Timeout& error) {
      PyErr_SetString(PyExc_TimeoutError, error.what());
    }
  });

  module.def(
      "current_sphere", [] { return System::current() ? System::current()->id : kNoSphere; },
      "The id of the sphere whose thread is calling, or -1.");
  module.def(
      "keep_freed_memory", &keep_freed_memory, py::arg("lean"),
      "Has the C library reuse freed memory instead of returning it; see runtime/malloc.py.");
  module.def(
      "join_dropped", [] { wait_interruptibly({}, &join_dropped_for); },
      "Waits until the threads of all systems that were dropped have ended.");
  module.def("set_thread_hooks", &SphereGil::set_hooks, py::arg("enter"), py::arg("leave"),
             "Called on a sphere's thread before its first and after its last Python call.");

  py::class_<PySystem, std::shared_ptr<PySystem>>(module, "System",
                                                  "The running hierarchy; see KissingSpheres.")
      .def(py::init<int, int, std::uint64_t>(), py::arg("levels"), py::arg("concurrency"),
           py::arg("starts") = 0, "`starts`: of the system that it replaces.")
      .def_property_readonly("concurrency",
                             [](const PySystem& self) { return self.core().concurrency(); })
      .def("start", &PySystem::start)
      .def(
          "stop",
          [](PySystem& self, Seconds timeout) {
            const PySystem::Lost lost = self.stop(timeout);
            return std::make_pair(lost.items, lost.error);
          },
          py::arg("timeout") = py::none(),
          "Returns what nobody was told of: how many items were not run, and an item's error.")
      .def("running", &PySystem::running)
      .def("forked", &PySystem::forked)
      .def("on_own_thread", [](const PySystem& self) { return self.core().on_own_thread(); })
      .def("submit", &PySystem::submit, py::arg("fn"), py::arg("items"), py::arg("collect"))
      .def("submit_native", &PySystem::submit_native, py::arg("fn"), py::arg("items"))
      .def("cancel", &cancel, py::arg("work"))
      .def(
          "pause", &pause,
          "In a work item: sleeps, without a turn to compute, until call_back(), or for no reason.")
      .def("call_back", &call_back, py::arg("leaf"),
           "Ends the pause of the item that a leaf is at, or the one to come.")
      .def("wait", &PySystem::wait, py::arg("timeout") = py::none())
      .def(
          "waiters",
          [](const PySystem& self, const PyBatch& work) { return self.waiters() + work.waiters(); },
          py::arg("work"), "How many threads wait for this work: for tests.")
      .def("require_running", &PySystem::require_running, py::arg("what"))
      .def("require_outside", &PySystem::require_outside, py::arg("what"))
      .def("barrier", &PySystem::barrier, py::arg("level"), py::arg("timeout") = py::none())
      .def("epoch", &PySystem::epoch, py::arg("timeout") = py::none())
      .def("send", &PySystem::send, py::arg("source"), py::arg("target"), py::arg("value"))
      .def("receive", &PySystem::receive, py::arg("sphere"), py::arg("timeout") = py::none())
      .def_property_readonly("starts", &PySystem::starts)
      .def("begin_trace", &begin_trace, py::arg("capacity"))
      .def("end_trace", &end_trace)
      .def_property_readonly("tracing", [](const PySystem& self) { return self.core().tracing(); })
      .def("trace_phase", &trace_phase, py::arg("label"), py::arg("shard"), py::arg("begin"),
           "Records what the calling thread did since `begin`, in nanoseconds.")
      .def("trace_gradient", &trace_gradient, py::arg("source"), py::arg("sent"),
           "Records that the calling thread takes gradients that a sphere had ready then.")
      .def(
          "subtrees", &subtrees,
          "(ns since start, [(sphere, spheres in each state, items, stolen, queued, busy ns)]): of "
          "the root alone, then of each kissing sphere's whole subtree.")
      .def("stats", [](const PySystem& self) { return self.core().stats(); });
}

}  // namespace torch_spheres::bindings
