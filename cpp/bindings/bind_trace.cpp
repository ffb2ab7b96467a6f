#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "trace.h"

namespace torch_spheres::bindings {

namespace py = pybind11;

void bind_trace(py::module_& module) {
  py::list labels;
  for (int i = 0; i < kTraceLabels; ++i) {
    labels.append(trace_label_name(static_cast<TraceLabel>(i)));
  }
  module.attr("TRACE_LABELS") = py::tuple(labels);

  py::class_<TraceTrack>(module, "TraceTrack",
                         "What one thread recorded; see observe/trace_recorder.py.")
      .def_readonly("sphere", &TraceTrack::sphere)
      .def_readonly("name", &TraceTrack::name)
      .def_readonly("native_id", &TraceTrack::native_id)
      .def_readonly("first_state", &TraceTrack::first_state)
      .def_readonly("last_state", &TraceTrack::last_state)
      .def_readonly("last_since", &TraceTrack::last_since)
      .def_readonly("lost", &TraceTrack::lost)
      .def_property_readonly(
          "events",
          [](const TraceTrack& self) {
            return py::bytes(reinterpret_cast<const char*>(self.events.data()),
                             self.events.size() * sizeof(TraceEvent));
          },
          "The events' memory, oldest first.");
  py::class_<TraceRecord>(module, "TraceRecord", "What all threads of a system recorded.")
      .def_readonly("begin", &TraceRecord::begin)
      .def_readonly("end", &TraceRecord::end)
      .def_readonly("queued", &TraceRecord::queued)
      .def_readonly("tracks", &TraceRecord::tracks);
}

}  // namespace torch_spheres::bindings
