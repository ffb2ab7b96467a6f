// Reads a torch tensor's address, type and shape without libtorch.
//
//     read_tensors_by(exchange);          // once, on import
//     TensorView view;
//     if (view_tensor(object, view)) ...  // false: not a plain dense CPU tensor, ask Python
//
// GIL held.  From 2.10 on torch publishes a C function for this in the DLPack exchange interface
// (torch.Tensor.__dlpack_c_exchange_api__, a capsule); the few structs of that interface's binary
// layout that are needed here are declared in tensor_view.cpp.  Without it the tensor's Python
// methods are called, which takes some half a microsecond more.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gradient_sum.h"

namespace torch_spheres::bindings {

struct TensorView {
  char* data = nullptr;
  DType dtype = DType::float32;
  std::size_t numel = 0;
  std::vector<std::int64_t> shape;

  std::size_t bytes() const { return numel * element_size(dtype); }
  bool same_form(const TensorView& other) const {
    return dtype == other.dtype && shape == other.shape;
  }
};

/// Before any tensor is viewed.  `exchange`: torch's capsule, or None.
void read_tensors_by(const pybind11::object& exchange);

/// True for a contiguous CPU tensor of one of the four types, with no pending negation.  It has to
/// be a torch.Tensor or Parameter itself: subclasses may mean something else by their memory.
bool view_tensor(pybind11::handle tensor, TensorView& view);

}  // namespace torch_spheres::bindings
