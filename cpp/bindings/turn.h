// Keeps a second thread out of an object that one thread at a time may use.
//
//     const Turn turn(taken_, "Gather");   // throws if another thread is in there
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

namespace torch_spheres::bindings {

/// While it lives no other thread may be in here.
class Turn {
 public:
  Turn(std::atomic<bool>& taken, const char* what) : taken_(taken) {
    if (taken_.exchange(true)) {
      throw std::runtime_error(std::string("this ") + what +
                               " is in use already; one thread at a time may call it");
    }
  }
  ~Turn() { taken_.store(false); }  // releases to the next turn's exchange
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  std::atomic<bool>& taken_;
};

}  // namespace torch_spheres::bindings
