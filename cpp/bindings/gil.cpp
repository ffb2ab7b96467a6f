#include "gil.h"

#include <unistd.h>

#include <atomic>
#include <utility>

#include "system.h"

namespace torch_spheres::bindings {

namespace {

thread_local PyThreadState* sphere_state = nullptr;

struct Hooks {
  py::object enter, leave;
};
// Never freed: a sphere may be calling the last ones.  Stored with release, and loaded with acquire
// by the spheres.
std::atomic<const Hooks*> hooks{nullptr};

/// GIL held.  A hook that fails is reported; in C, since no C++ exception may leave a thread with
/// the GIL.
void call_hook(const py::object Hooks::* which, const char* argument) noexcept {
  const Hooks* set = hooks.load(std::memory_order_acquire);
  if (set == nullptr) return;
  call_or_stay([&] {
    PyObject* hook = (set->*which).ptr();
    PyObject* result = argument != nullptr ? PyObject_CallFunction(hook, "s", argument)
                                           : PyObject_CallNoArgs(hook);
    if (result == nullptr) PyErr_WriteUnraisable(hook);
    Py_XDECREF(result);
  });
}

}  // namespace

bool ending() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0 || Py_IsInitialized() == 0;
#else
  return _Py_IsFinalizing() != 0 || Py_IsInitialized() == 0;
#endif
}

void stay() {
  for (;;) ::pause();
}

bool without_python() { return ending() && System::current() != nullptr; }

void SphereGil::set_hooks(py::function enter, py::function leave) {
  hooks.store(new Hooks{std::move(enter), std::move(leave)}, std::memory_order_release);
}

void SphereGil::acquire() {
  if (ending()) stay();
  if (sphere_state != nullptr) {
    call_or_stay([] { PyEval_RestoreThread(sphere_state); });
    return;
  }
  // First: it may throw, and then nobody would give the GIL back.
  const std::string name = "sphere " + Topology::path_string(System::current()->id);
  call_or_stay([] { PyGILState_Ensure(); });  // made once, released in leave_thread()
  sphere_state = PyThreadState_Get();
  call_hook(&Hooks::enter, name.c_str());
}

void SphereGil::leave_thread() {
  // Too late the interpreter needs nothing back, and the thread may end.
  if (sphere_state == nullptr || ending()) return;
  call_or_stay([] { PyEval_RestoreThread(sphere_state); });
  call_hook(&Hooks::leave, nullptr);
  sphere_state = nullptr;
  call_or_stay([] { PyGILState_Release(PyGILState_UNLOCKED); });
}

}  // namespace torch_spheres::bindings
