#include "subtree.h"

#include "system.h"

namespace torch_spheres {

SubtreeTotals System::subtree_totals(SphereId top) const {
  SubtreeTotals totals;
  SphereId first = top;
  SphereId last = top;
  for (const std::uint64_t ns : sphere(top).clock.times()) totals.elapsed_ns += ns;
  do {  // level by level: the ids of a level's part are consecutive
    for (SphereId id = first; id <= last; ++id) {
      const Sphere& s = sphere(id);
      const auto spent = s.clock.times();
      ++totals.spheres[static_cast<std::size_t>(s.clock.state())];
      totals.items_run += s.counters.items_run.get();
      totals.items_stolen += s.counters.items_stolen.get();
      totals.busy_ns += spent[static_cast<std::size_t>(State::kProcessing)] +
                        spent[static_cast<std::size_t>(State::kAccumulating)];
      if (topology_.is_leaf(id)) {
        totals.queued += static_cast<std::uint64_t>(ring_.was_queued(Topology::offset(id)));
      }
    }
    first = Topology::child(first, 0);
    last = Topology::child(last, kKissing - 1);
  } while (top != 0 && topology_.contains(first));
  return totals;
}

}  // namespace torch_spheres
