// The shape of the hierarchy against a tree grown node by node, and the table of states.
#include "topology.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <numeric>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "stats.h"

using namespace torch_spheres;

namespace {

struct Node {
  SphereId parent = kNoSphere;
  int level = 0;
  std::vector<int> path;
  std::vector<SphereId> children;
};

/// The tree, grown breadth-first without any of Topology's arithmetic.
std::vector<Node> grow(int levels) {
  std::vector<Node> nodes(1);
  for (std::size_t id = 0; id < nodes.size(); ++id) {
    if (nodes[id].level + 1 == levels) continue;
    for (int group = 0; group < 12; ++group) {
      Node child{static_cast<SphereId>(id), nodes[id].level + 1, nodes[id].path, {}};
      child.path.push_back(group);
      nodes[id].children.push_back(static_cast<SphereId>(nodes.size()));
      nodes.push_back(child);
    }
  }
  return nodes;
}

std::int64_t spelt(const std::vector<int>& path) {
  std::int64_t number = 0, weight = 1;
  for (const int digit : path) {
    number += digit * weight;
    weight *= 12;
  }
  return number;
}

}  // namespace

TEST(counts_of_spheres_and_leaves) {
  const int total[] = {1, 13, 157, 1885}, leaves[] = {1, 12, 144, 1728};
  for (int levels = 1; levels <= 4; ++levels) {
    const Topology t(levels);
    CHECK_EQ(t.levels(), levels);
    CHECK_EQ(t.total(), total[levels - 1]);
    CHECK_EQ(t.leaves(), leaves[levels - 1]);
    CHECK_EQ(Topology::count(levels - 1), leaves[levels - 1]);
    CHECK(t.contains(0) && t.contains(t.total() - 1));
    CHECK(!t.contains(-1) && !t.contains(t.total()) && !t.contains(std::int64_t{1} << 32));
  }
  for (const int levels : {-1, 0, 5, 1000}) CHECK_THROWS(Topology{levels}, std::invalid_argument);
}

TEST(every_sphere_of_every_level) {
  for (int levels = 1; levels <= 4; ++levels) {
    const Topology t(levels);
    const std::vector<Node> nodes = grow(levels);
    CHECK_EQ(static_cast<int>(nodes.size()), t.total());
    for (SphereId id = 0; id < t.total(); ++id) {
      const Node& node = nodes[static_cast<std::size_t>(id)];
      CHECK_EQ(Topology::parent(id), node.parent);
      CHECK_EQ(Topology::level(id), node.level);
      CHECK_EQ(Topology::group(id), node.path.empty() ? kNoSphere : node.path.back());
      CHECK(Topology::path(id) == node.path);
      CHECK_EQ(Topology::offset(id), spelt(node.path));
      CHECK_EQ(t.is_leaf(id), node.children.empty());
      for (std::size_t group = 0; group < node.children.size(); ++group) {
        CHECK_EQ(Topology::child(id, static_cast<int>(group)), node.children[group]);
      }
    }
  }
}

TEST(paths_are_written_with_dots) {
  CHECK_EQ(Topology::path_string(0), "root");
  CHECK_EQ(Topology::path_string(8), "7");
  CHECK_EQ(Topology::path_string(Topology::child(2, 7)), "1.7");
  CHECK_EQ(Topology::path_string(1884), "11.11.11");
}

TEST(items_go_to_the_leaf_with_their_residue) {
  for (int levels = 1; levels <= 4; ++levels) {
    const Topology t(levels);
    // The leaves by the number that they spell: a leaf's items are a residue class.
    std::vector<SphereId> by_offset(std::size_t(t.leaves()), -1);
    const std::vector<Node> nodes = grow(levels);
    for (std::size_t id = 0; id < nodes.size(); ++id) {
      if (nodes[id].level != levels - 1) continue;
      SphereId& place = by_offset[static_cast<std::size_t>(spelt(nodes[id].path))];
      CHECK_EQ(place, -1);
      place = static_cast<SphereId>(id);
    }
    const auto check = [&](std::int64_t item) {
      CHECK_EQ(t.leaf_of_item(item), by_offset[static_cast<std::size_t>(item) % by_offset.size()]);
    };
    for (std::int64_t item = 0; item < 4000; ++item) check(item);
    for (int shift = 12; shift < 62; ++shift) {
      check((std::int64_t{1} << shift) - 1);
      check((std::int64_t{1} << shift) + 7);
    }
  }
}

TEST(edges_join_parents_children_and_siblings_only) {
  for (int levels = 1; levels <= 4; ++levels) {
    const std::vector<Node> nodes = grow(levels);
    std::set<std::pair<SphereId, SphereId>> edges;
    for (std::size_t id = 0; id < nodes.size(); ++id) {
      for (const SphereId a : nodes[id].children) {
        edges.insert({a, static_cast<SphereId>(id)});
        edges.insert({static_cast<SphereId>(id), a});
        for (const SphereId b : nodes[id].children) {
          if (a != b) edges.insert({a, b});
        }
      }
    }
    std::size_t found = 0;
    const auto total = static_cast<SphereId>(nodes.size());
    for (SphereId a = -1; a < total; ++a) {
      for (SphereId b = -1; b < total; ++b) found += Topology::has_edge(a, b);
    }
    CHECK_EQ(found, edges.size());
    for (const auto& [a, b] : edges) CHECK(Topology::has_edge(a, b));
  }
}

TEST(every_pair_of_states_is_judged) {
  // Rows: from.  Columns: READY, PROCESSING, IDLE, WAITING, ACCUMULATING, TERMINATING.
  const bool allowed[kStates][kStates] = {
      /* READY        */ {0, 1, 1, 1, 1, 1},
      /* PROCESSING   */ {1, 0, 0, 0, 0, 0},
      /* IDLE         */ {1, 0, 0, 0, 0, 0},
      /* WAITING      */ {1, 0, 0, 0, 0, 0},
      /* ACCUMULATING */ {1, 0, 0, 0, 0, 0},
      /* TERMINATING  */ {1, 0, 0, 0, 0, 0},
  };
  std::set<std::string> names;
  for (int from = 0; from < kStates; ++from) {
    names.insert(state_name(static_cast<State>(from)));
    for (int to = 0; to < kStates; ++to) {
      CHECK_EQ(transition_allowed(static_cast<State>(from), static_cast<State>(to)),
               allowed[from][to]);
    }
  }
  CHECK_EQ(static_cast<int>(names.size()), kStates);
}

TEST(times_in_states_add_up) {
  StateClock clock;
  CHECK(clock.state() == State::kTerminating);
  const std::uint64_t before_start = now_ns();
  clock.transition(State::kReady);
  const std::uint64_t after_start = now_ns();
  for (int round = 0; round < 3; ++round) {
    for (const State state :
         {State::kProcessing, State::kIdle, State::kWaiting, State::kAccumulating}) {
      clock.transition(state);
      clock.transition(state);  // staying is no transition
      CHECK(clock.state() == state);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      clock.transition(State::kReady);
    }
  }
  const auto total = [&] {
    const auto times = clock.times();
    return std::accumulate(times.begin(), times.end(), std::uint64_t{0});
  };
  const std::uint64_t before_running = now_ns();
  const std::uint64_t running = total();  // the running state counts up to now
  const std::uint64_t after_running = now_ns();
  CHECK(running >= before_running - after_start && running <= after_running - before_start);
  const std::uint64_t before_end = now_ns();
  clock.transition(State::kTerminating);
  const std::uint64_t after_end = now_ns();
  const auto times = clock.times();
  CHECK(total() >= before_end - after_start && total() <= after_end - before_start);
  for (const State state :
       {State::kProcessing, State::kIdle, State::kWaiting, State::kAccumulating}) {
    CHECK(times[static_cast<std::size_t>(state)] >= 6'000'000);
  }
  CHECK_EQ(times[static_cast<std::size_t>(State::kTerminating)], std::uint64_t{0});
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  CHECK(clock.times() == times);  // TERMINATING is not counted on
  clock.transition(State::kReady);
  CHECK_EQ(clock.times()[static_cast<std::size_t>(State::kTerminating)], std::uint64_t{0});
}

TEST(an_illegal_transition_aborts) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    close(STDERR_FILENO);
    std::signal(SIGABRT, SIG_DFL);
    StateClock clock;
    clock.transition(State::kReady);
    clock.transition(State::kProcessing);
    clock.transition(State::kIdle);
    _exit(0);
  }
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}
