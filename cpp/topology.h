// The shape of the hierarchy: pure arithmetic on sphere ids, no state.
//
// Spheres are numbered breadth-first: the root is 0, the kissing spheres 1-12, and so on; level l
// holds 12^l of them.  Work item k belongs to the leaf whose path from the root is k written in
// base 12, least significant digit first, so twelve consecutive items go to twelve different
// subtrees.  A sphere's *offset* is the number that its path spells that way: the items of its
// subtree are exactly those congruent to the offset modulo 12^level.
//
//     Topology t(3);                  // 1 + 12 + 144 spheres, 144 leaves
//     t.leaf_of_item(17);             // path 5.1 -> sphere 13 + 5*12 + 1
//     t.offset(t.leaf_of_item(17));   // 17
//
// Any thread may call anything here.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace torch_spheres {

/// Spheres that can touch one sphere of the same size at once, in three dimensions.
inline constexpr int kKissing = 12;
inline constexpr int kMaxLevels = 4;

using SphereId = std::int32_t;
inline constexpr SphereId kNoSphere = -1;

class Topology {
 public:
  /// Throws std::invalid_argument unless 1 <= levels <= 4.
  explicit Topology(int levels) : levels_(levels) {
    if (levels < 1 || levels > kMaxLevels) {
      throw std::invalid_argument("levels must be 1 to " + std::to_string(kMaxLevels) +
                                  " (1, 13, 157 or 1885 spheres), got " + std::to_string(levels));
    }
  }

  int levels() const { return levels_; }
  int leaf_level() const { return levels_ - 1; }
  std::int32_t total() const { return first(levels_); }
  std::int32_t leaves() const { return count(leaf_level()); }

  /// Spheres of one level: 1, 12, 144, 1728.
  static std::int32_t count(int level) {
    std::int32_t n = 1;
    for (int i = 0; i < level; ++i) n *= kKissing;
    return n;
  }
  /// Id of the first sphere of a level, which is also how many spheres lie above it.
  static SphereId first(int level) { return (count(level) - 1) / (kKissing - 1); }

  bool contains(std::int64_t id) const { return id >= 0 && id < total(); }
  /// Throws std::invalid_argument unless there is such a sphere.
  void require(std::int64_t id) const {
    if (contains(id)) return;
    throw std::invalid_argument("there is no sphere " + std::to_string(id) + "; ids are 0 to " +
                                std::to_string(total() - 1));
  }
  bool is_leaf(SphereId id) const { return id >= first(leaf_level()); }
  static int level(SphereId id) {
    int level = 0;
    while (id >= first(level + 1)) ++level;
    return level;
  }
  /// kNoSphere for the root.
  static SphereId parent(SphereId id) { return id == 0 ? kNoSphere : (id - 1) / kKissing; }
  static SphereId child(SphereId id, int group) { return id * kKissing + 1 + group; }
  /// Index among the siblings, 0-11.  The root has no siblings and holds all twelve groups.
  static int group(SphereId id) { return id == 0 ? kNoSphere : (id - 1) % kKissing; }

  /// The groups met on the way from the root, e.g. {1, 7}; empty for the root.
  static std::vector<int> path(SphereId id) {
    std::vector<int> groups(static_cast<std::size_t>(level(id)));
    for (auto it = groups.rbegin(); it != groups.rend(); ++it, id = parent(id)) *it = group(id);
    return groups;
  }
  /// "root", "7", "1.7", "11.11.11".
  static std::string path_string(SphereId id) {
    if (id == 0) return "root";
    std::string text;
    for (const int g : path(id)) {
      if (!text.empty()) text += '.';
      text += std::to_string(g);
    }
    return text;
  }

  /// The number spelt by a sphere's path, least significant digit first.
  static std::int32_t offset(SphereId id) {
    std::int32_t offset = 0;
    for (; id != 0; id = parent(id)) offset = offset * kKissing + group(id);
    return offset;
  }
  /// The leaf that owns work item `item` (>= 0).
  SphereId leaf_of_item(std::int64_t item) const {
    SphereId id = 0;
    for (; !is_leaf(id); item /= kKissing) id = child(id, static_cast<int>(item % kKissing));
    return id;
  }

  /// Whether two spheres touch: parent and child, or siblings.  A sphere does not touch itself.
  static bool has_edge(SphereId a, SphereId b) {
    if (a == b || a < 0 || b < 0) return false;
    return parent(a) == b || parent(b) == a || (a != 0 && b != 0 && parent(a) == parent(b));
  }

 private:
  int levels_;
};

}  // namespace torch_spheres
