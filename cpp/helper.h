// The thread that waits for a batch lends the spheres a hand with it.
//
//     while (system.try_submit(batch) == ...) ...
//     Helper helper(system);                        // at once: before the first sphere is awake
//     while (!helper.wait_for(*batch, 40ms)) { /* look for Ctrl-C */ }
//
// For batches of short items, like the pieces of a gradient sum: waking a sleeping sphere takes as
// long as several of them.  The helper takes a permit, so that no more than `concurrency` threads
// run work, and works under it until no item is left to take; with all permits out it only waits.
// The items that it runs count for the root, which is why there is one helper at a time, and why
// the root comes to no barrier while there is one.
//
// Owner: all of it; not on a sphere's own thread.
#pragma once

#include "system.h"

namespace torch_spheres {

class Helper {
 public:
  explicit Helper(System& system) : system_(system), helps_(try_begin()) {}
  ~Helper() { end(); }
  Helper(const Helper&) = delete;
  Helper& operator=(const Helper&) = delete;

  /// False if all permits were out, another thread helps, the root stands at a barrier or the
  /// system is not running; and once no item is left to take.
  bool helps() const { return helps_; }

  /// Works for and waits for a batch that this thread submitted; true once it is done.  Takes
  /// longer than `timeout` by at most the items taken last.
  bool wait_for(Batch& batch, Milliseconds timeout);

 private:
  bool try_begin();
  bool run_items(const Batch& batch, Milliseconds time);
  void end();

  System& system_;
  bool helps_;
};

}  // namespace torch_spheres
