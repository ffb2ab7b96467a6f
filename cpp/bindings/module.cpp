#include <pybind11/pybind11.h>

#include "bindings.h"

namespace py = pybind11;

// Safe without the GIL: all state that threads share is atomic or behind a mutex.
PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  module.doc() = "The C++ runtime of torch_spheres; use it through the package's Python classes.";
  using namespace torch_spheres::bindings;
  bind_topology(module);
  bind_stats(module);
  bind_trace(module);
  bind_work(module);
  bind_system(module);
  bind_gradients(module);
  bind_gather(module);
  bind_openmp(module);
}
