// What a whole subtree has done and is doing: one line of a live display.
//
//     for (SphereId id = 0; id <= kKissing; ++id) show(system.subtree_totals(id));
//
// With four levels thirteen of these are 1885 spheres, four times a second: they are added up here,
// so that nobody makes 1885 objects of them.
#pragma once

#include <array>
#include <cstdint>

#include "stats.h"

namespace torch_spheres {

/// The sums of a subtree's figures at about one moment (each is read at its own).
struct SubtreeTotals {
  std::array<std::int32_t, kStates> spheres{};  ///< how many are in each state, in State's order
  std::uint64_t items_run = 0;
  std::uint64_t items_stolen = 0;
  std::uint64_t queued = 0;      ///< items that wait in the leaves' queues
  std::uint64_t busy_ns = 0;     ///< processing and accumulating, added up over the spheres
  std::uint64_t elapsed_ns = 0;  ///< since start(), until stop(): of the first sphere
};

}  // namespace torch_spheres
