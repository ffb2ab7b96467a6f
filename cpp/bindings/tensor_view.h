// Reads a torch tensor's address, type and shape without libtorch and without slow Python calls.
//
//     TensorView view;
//     if (view_tensor(object, view)) ...   // false: not a plain dense CPU tensor, ask Python
//
// GIL held.  torch publishes a C function for this in the DLPack exchange interface
// (torch.Tensor.__dlpack_c_exchange_api__, a capsule); the few structs of that interface's binary
// layout that are needed here are declared in tensor_view.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

#include "gradient_sum.h"

namespace torch_spheres::bindings {

struct TensorView {
  char* data = nullptr;
  DType dtype = DType::float32;
  std::size_t numel = 0;
  std::int32_t dimensions = 0;
  const std::int64_t* shape = nullptr;  // lives as long as the tensor

  std::size_t bytes() const { return numel * element_size(dtype); }
  bool same_form(const TensorView& other) const;
};

/// True for a contiguous CPU tensor of one of the four types, with no pending negation.
bool view_tensor(pybind11::handle tensor, TensorView& view);

}  // namespace torch_spheres::bindings
