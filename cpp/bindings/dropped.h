// Systems that nobody has any more, but whose threads could not be joined: each is freed once they
// have ended, when the next system is made or at the interpreter's exit.
//
// Any thread: everything, with the GIL or without.
#pragma once

#include <memory>

#include "system.h"

namespace torch_spheres::bindings {

void keep_dropped(std::shared_ptr<System> system);

/// Frees those whose threads have ended; waits so long for each.  True: none is left.
bool join_dropped_for(Milliseconds time);

}  // namespace torch_spheres::bindings
