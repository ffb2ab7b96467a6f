#include <pybind11/pybind11.h>

#include "bindings.h"
#include "py_gather.h"

namespace torch_spheres::bindings {

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
