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
  py::class_<NativeFunction>(module, "NativeFunction", R"(
      A C function ``void f(void *context, int64_t item)``, which spheres call without the GIL.

      Args:
          address: of the function, as ctypes (``ctypes.cast(f, ctypes.c_void_p).value``) or Numba
              (``cfunc.address``) have it.
          context: passed on with each item; the address of what the function reads and writes,
              or 0.
          owner: any object; kept alive as long as this one and its work, for what the two addresses
              point to.

      Attributes:
          address: as given.

      Raises:
          ValueError: `address` is 0.)")
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

  py::class_<PyBatch>(module, "Work", collected(), R"(
      A batch of work items under way: what `KissingSpheres.distribute_work` returns.

      Attributes:
          items: how many the batch has.
          cancelled: how many of them will never run, because of an error or of
              `KissingSpheres.stop`; final once the batch is done.
          results: a list with what each item returned if the batch was made by
              `KissingSpheres.map`, else None.)")
      .def("done", &PyBatch::done, R"(
      Whether all items have been run, or will never be.

      Returns:
          True once that is so, also if an item failed; does not wait.)")
      .def("wait", &PyBatch::wait, py::arg("timeout") = py::none(), R"(
      Waits until the batch is done; Ctrl-C is answered meanwhile.

      Args:
          timeout: seconds, at least 0; None waits for ever.

      Raises:
          ValueError: `timeout` is negative.
          Exception: that of the first item that failed, the very object, with a note of the item and
              the sphere.
          TimeoutError: the batch was not done in time. It goes on; call `wait` again.
          StoppedError: items were not run, as the spheres were stopped before.
          RuntimeError: called from inside a work item of the same spheres, or in a forked child.)")
      .def_property_readonly("items", [](const PyBatch& self) { return self.core()->items(); })
      .def_property_readonly("cancelled",
                             [](const PyBatch& self) { return self.core()->cancelled(); })
      .def_property_readonly("results", &PyBatch::results);
}

}  // namespace torch_spheres::bindings
