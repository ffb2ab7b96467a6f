#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "stats.h"

namespace torch_spheres::bindings {

namespace py = pybind11;

void bind_stats(py::module_& module) {
  py::native_enum<State>(module, "State", "enum.Enum", "What a sphere's thread is doing.")
      .value("READY", State::kReady)
      .value("PROCESSING", State::kProcessing)
      .value("IDLE", State::kIdle)
      .value("WAITING", State::kWaiting)
      .value("ACCUMULATING", State::kAccumulating)
      .value("TERMINATING", State::kTerminating)
      .finalize();
  module.def("transition_allowed", &transition_allowed, py::arg("source"), py::arg("target"),
             "Whether the one table of state transitions has this one.");

  py::class_<SphereStats>(module, "SphereStats", "One sphere's figures at one moment.")
      .def_readonly("id", &SphereStats::id)
      .def_readonly("state", &SphereStats::state)
      .def_readonly("items_run", &SphereStats::items_run)
      .def_readonly("items_stolen", &SphereStats::items_stolen)
      .def_readonly("items_given", &SphereStats::items_given)
      .def_readonly("messages_sent", &SphereStats::messages_sent)
      .def_readonly("messages_received", &SphereStats::messages_received)
      .def_readonly("queue_high_water", &SphereStats::queue_high_water)
      .def_readonly("state_ns", &SphereStats::state_ns,
                    "Nanoseconds in each state, in the order of State.");
}

}  // namespace torch_spheres::bindings
