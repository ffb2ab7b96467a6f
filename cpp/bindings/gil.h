// Who holds the GIL, on a sphere's thread and elsewhere, up to the end of the interpreter.
//
//     SphereGil gil;            // on a sphere's thread, for Python work
//     const GilRelease release; // on a thread that holds the GIL, for waits and native work
//     drop(object, other);      // in destructors, which run on any thread
//
// Once the interpreter is being torn down, a thread that asks for the GIL never gets it.  From
// Python 3.14 on it sleeps until the process ends.  Before, Python ends it with pthread_exit(),
// which unwinds its stack, and aborts at the first destructor on the way that takes the GIL or is
// noexcept, as destructors are.  call_or_stay() makes 3.14's way of it: the thread sleeps where it
// asked.  So nobody may join a sphere's thread once ending() is true.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace torch_spheres::bindings {

namespace py = pybind11;

/// Whether the interpreter is being torn down, or has been.  Any thread.
bool ending();

/// Sleeps until the process ends.
[[noreturn]] void stay();

/// Calls what asks for the GIL, directly or in Python code; the thread stays there if it is too
/// late.
template <typename Call>
decltype(auto) call_or_stay(Call call) {
  try {
    return call();
  } catch (...) {
    // What pthread_exit() unwinds with is no C++ exception; it may be somebody else's.
    if (std::current_exception() || !ending()) throw;
    stay();
  }
}

/// Lets go of the GIL while it lives.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    call_or_stay([this] { PyEval_RestoreThread(state_); });
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* const state_;
};

/// Holds the GIL on a sphere's thread, with the one thread state that the sphere keeps for life.
class SphereGil {
 public:
  SphereGil() { acquire(); }
  ~SphereGil() { release(); }
  SphereGil(const SphereGil&) = delete;
  SphereGil& operator=(const SphereGil&) = delete;
  /// Gives other threads a chance.
  void yield() {
    release();
    acquire();
  }

  /// Called on a sphere's thread before it ends: gives the thread state back.
  static void leave_thread();
  /// Python callables for a sphere's first and last moment with Python: enter(name), leave().
  static void set_hooks(py::function enter, py::function leave);

 private:
  static void acquire();
  static void release() { PyEval_SaveThread(); }
};

/// GIL held.  Lets go of Python objects.  (A py::object that does so itself is noexcept, and what
/// an object does at its end may ask for the GIL.)
template <typename... Objects>
void let_go(Objects&... objects) {
  (call_or_stay([object = objects.release().ptr()] { Py_XDECREF(object); }), ...);
}

/// Whether the calling thread will not get the GIL any more: it is a sphere's, and too late.
bool without_python();

/// Lets go of Python objects on any thread; they are left alone where that is too late.
template <typename... Objects>
void drop(Objects&... objects) noexcept {
  if (without_python()) {
    (objects.release(), ...);
    return;
  }
  call_or_stay([&] {
    const py::gil_scoped_acquire gil;
    let_go(objects...);
  });
}

}  // namespace torch_spheres::bindings
