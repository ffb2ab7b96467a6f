// What module.cpp calls: one function per topic.
#pragma once

#include <pybind11/pybind11.h>

namespace torch_spheres::bindings {

void bind_topology(pybind11::module_& module);
void bind_stats(pybind11::module_& module);
void bind_trace(pybind11::module_& module);
void bind_work(pybind11::module_& module);
void bind_system(pybind11::module_& module);
void bind_gradients(pybind11::module_& module);
void bind_gather(pybind11::module_& module);
void bind_openmp(pybind11::module_& module);

}  // namespace torch_spheres::bindings
