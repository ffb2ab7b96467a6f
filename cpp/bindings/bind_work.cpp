#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "py_system.h"

namespace torch_spheres::bindings {

namespace {

/// Has Python's garbage collector look into a Work.
py::custom_type_setup collected() {
  return py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
      Py_VISIT(Py_TYPE(self));
      if (!py::detail::is_holder_constructed(self)) return 0;
      return py::cast<PyBatch&>(py::handle(self)).traverse(visit, arg);
    };
    type.tp_clear = [](PyObject* self) -> int {
      if (py::detail::is_holder_constructed(self)) py::cast<PyBatch&>(py::handle(self)).clear();
      return 0;
    };
  });
}

}  // namespace

void bind_work(py::module_& module) {
  py::class_<NativeFunction>(
      module, "NativeFunction",
      "A C function `void f(void *context, int64_t item)` by its address, as from ctypes or Numba. "
      "Spheres call it without the GIL.")
      .def(py::init([](std::uintptr_t address, std::uintptr_t context, py::object owner) {
             if (address == 0) throw std::invalid_argument("address must not be 0");
             return NativeFunction{reinterpret_cast<NativeFunction::Pointer>(address),
                                   reinterpret_cast<void*>(context), std::move(owner),
                                   std::make_shared<Pace>()};
           }),
           py::arg("address"), py::arg("context") = 0, py::arg("owner") = py::none())
      .def_property_readonly("address", [](const NativeFunction& self) {
        return reinterpret_cast<std::uintptr_t>(self.pointer);
      });

  py::class_<PyBatch>(module, "Work", collected(),
                      "What distribute_work() returns: one batch under way.")
      .def("done", &PyBatch::done, "Whether all items have been run, or will never be.")
      .def("wait", &PyBatch::wait, py::arg("timeout") = py::none(),
           "Waits until the batch is finished. Raises what its first failed item raised, "
           "TimeoutError after `timeout` seconds (the work goes on), or StoppedError if items were "
           "not run because the spheres were stopped.")
      .def_property_readonly("items", [](const PyBatch& self) { return self.core()->items(); })
      .def_property_readonly(
          "cancelled", [](const PyBatch& self) { return self.core()->cancelled(); },
          "Items that will never run, because of an error or of stop().")
      .def_property_readonly("results", &PyBatch::results);
}

}  // namespace torch_spheres::bindings
