#include "topology.h"

#include <set>

#include "check.h"
#include "stats.h"

using namespace torch_spheres;

TEST(counts_of_spheres_and_leaves) {
  const int totals[] = {1, 13, 157, 1885};
  const int leaves[] = {1, 12, 144, 1728};
  for (int levels = 1; levels <= 4; ++levels) {
    const Topology t(levels);
    CHECK_EQ(t.total(), totals[levels - 1]);
    CHECK_EQ(t.leaves(), leaves[levels - 1]);
  }
  CHECK_THROWS(Topology(0), std::invalid_argument);
  CHECK_THROWS(Topology(5), std::invalid_argument);
}

TEST(every_sphere_is_its_parents_child) {
  const Topology t(4);
  for (SphereId id = 1; id < t.total(); ++id) {
    const SphereId parent = Topology::parent(id);
    CHECK_EQ(Topology::child(parent, Topology::group(id)), id);
    CHECK_EQ(Topology::level(id), Topology::level(parent) + 1);
    CHECK(Topology::has_edge(id, parent));
    CHECK(Topology::has_edge(parent, id));
    CHECK(!Topology::has_edge(id, id));
    CHECK_EQ(t.is_leaf(id), Topology::level(id) == 3);
  }
  CHECK_EQ(Topology::parent(0), kNoSphere);
  CHECK_EQ(Topology::group(0), kNoSphere);
}

TEST(edges_join_parents_children_and_siblings_only) {
  const Topology t(3);
  for (SphereId a = 0; a < t.total(); ++a) {
    int touching = 0;
    for (SphereId b = 0; b < t.total(); ++b) touching += Topology::has_edge(a, b);
    const int expected = (a > 0 ? 12 : 0) + (t.is_leaf(a) ? 0 : 12);  // parent + 11, children
    CHECK_EQ(touching, expected);
  }
  CHECK(!Topology::has_edge(0, 13));   // a grandchild
  CHECK(!Topology::has_edge(13, 25));  // a cousin
}

TEST(items_belong_to_the_leaf_whose_path_they_spell_in_base_12) {
  for (int levels = 1; levels <= 4; ++levels) {
    const Topology t(levels);
    std::set<SphereId> seen;
    for (int item = 0; item < 2 * t.leaves(); ++item) {
      const SphereId leaf = t.leaf_of_item(item);
      CHECK(t.is_leaf(leaf));
      CHECK_EQ(Topology::offset(leaf), item % t.leaves());
      int rest = item;
      for (const int group : Topology::path(leaf)) {
        CHECK_EQ(group, rest % 12);
        rest /= 12;
      }
      if (item < t.leaves()) CHECK(seen.insert(leaf).second);
    }
  }
  CHECK_EQ(Topology::path_string(Topology(3).leaf_of_item(17)), std::string("5.1"));
  CHECK_EQ(Topology::path_string(0), std::string("root"));
}

TEST(the_table_of_transitions_is_a_hub) {
  for (int from = 0; from < kStates; ++from) {
    for (int to = 0; to < kStates; ++to) {
      const State a = static_cast<State>(from);
      const State b = static_cast<State>(to);
      const bool expected = (a == State::kReady) != (b == State::kReady);
      CHECK_EQ(transition_allowed(a, b), expected);
    }
  }
}

TEST(times_add_up_to_the_time_that_passed) {
  StateClock clock;
  const std::uint64_t start = now_ns();
  const State round[] = {State::kProcessing, State::kIdle, State::kWaiting, State::kAccumulating};
  for (int i = 0; i < 1000; ++i) {
    clock.transition(State::kReady);
    clock.transition(round[i % 4]);
  }
  clock.transition(State::kReady);
  std::uint64_t total = 0;
  for (const std::uint64_t ns : clock.times()) total += ns;
  const std::uint64_t passed = now_ns() - start;
  CHECK(total <= passed);
  CHECK(total >= passed / 2);
}

int main(int argc, char** argv) { return torch_spheres::testing::run_all_tests(argc, argv); }
