#include "dropped.h"

#include <atomic>
#include <utility>

namespace torch_spheres::bindings {

namespace {

// A stack without a lock, which a thread of the parent could hold at a fork().
struct Dropped {
  std::shared_ptr<System> system;
  Dropped* next;
};
std::atomic<Dropped*> all_dropped{nullptr};

}  // namespace

void keep_dropped(std::shared_ptr<System> system) {
  auto* node = new Dropped{std::move(system), all_dropped.load(std::memory_order_relaxed)};
  // Releases the node to the exchange (acquire) in join_dropped_for().
  while (!all_dropped.compare_exchange_weak(node->next, node, std::memory_order_release,
                                            std::memory_order_relaxed)) {
  }
}

bool join_dropped_for(Milliseconds time) {
  bool none_left = true;
  for (Dropped* next = all_dropped.exchange(nullptr, std::memory_order_acquire); next != nullptr;) {
    std::unique_ptr<Dropped> node(std::exchange(next, next->next));
    if (node->system->forked()) {
      (void)node.release();  // its threads are in the parent: nothing to join, nothing to free
    } else if (!node->system->join_for(time)) {
      keep_dropped(std::move(node->system));
      none_left = false;
    }
  }
  return none_left;
}

}  // namespace torch_spheres::bindings
