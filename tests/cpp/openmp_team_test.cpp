// A team is held and let go, with a parallel region made of plain threads in OpenMP's place.
#include "openmp_team.h"

#include <sys/wait.h>
#include <unistd.h>

#include <optional>
#include <vector>

#include "check.h"
#include "start_line.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

/// As many as are asked for, or as `most` allows; one region at a time for each thread.
thread_local std::vector<std::thread> region;
thread_local int size_of_region = 1;
thread_local int regions_ended = 0;
std::atomic<int> most{1000};
std::atomic<int> finished{0};  // threads, of all regions

void start(void (*work)(void*), void* data, unsigned threads) {
  size_of_region = std::min(static_cast<int>(threads), most.load());
  for (int i = 1; i < size_of_region; ++i) {
    region.emplace_back([=] {
      work(data);
      ++finished;
    });
  }
}
void end() {
  for (std::thread& thread : region) thread.join();
  region.clear();
  size_of_region = 1;
  ++regions_ended;
}
int team_size() { return size_of_region; }

const OpenMp kOpenMp{&start, &end, &team_size};

}  // namespace

TEST(threads_sleep_until_the_team_is_released) {
  finished = 0;
  regions_ended = 0;
  HeldTeam team(kOpenMp, 4);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_EQ(finished.load(), 0);
  team.release();
  CHECK_EQ(finished.load(), 3);
  team.release();  // only the first one ends the region
  CHECK_EQ(regions_ended, 1);
}

TEST(a_forked_child_leaves_the_region_as_it_is) {
  finished = 0;
  regions_ended = 0;
  HeldTeam team(kOpenMp, 3);
  const pid_t child = fork();
  if (child == 0) {
    team.release();
    _exit(regions_ended);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
  team.release();
  CHECK_EQ(regions_ended, 1);
}

TEST(the_destructor_releases) {
  finished = 0;
  regions_ended = 0;
  {
    const HeldTeam team(kOpenMp, 3);
  }
  CHECK_EQ(finished.load(), 2);
  CHECK_EQ(regions_ended, 1);
}

TEST(a_team_may_be_smaller_than_was_asked_for) {
  regions_ended = 0;
  for (const int allowed : {1, 2, 3}) {
    most = allowed;
    finished = 0;
    {
      const HeldTeam team(kOpenMp, 8);
    }
    CHECK_EQ(finished.load(), allowed - 1);
  }
  most = 1000;
  CHECK_EQ(regions_ended, 3);
}

TEST(many_callers_hold_teams_again_and_again) {
  constexpr int kCallers = 4;
  const int times = rounds(200);
  finished = 0;
  StartLine line(kCallers);
  std::atomic<int> ended{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < kCallers; ++c) {
    callers.emplace_back([&, c] {
      regions_ended = 0;
      for (int i = 0; i < times; ++i) {
        line.wait();
        const HeldTeam team(kOpenMp, static_cast<unsigned>(2 + c));
        // Released at once: its threads may be at the gate, asleep, or not there yet.
      }
      ended += regions_ended;
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(ended.load(), kCallers * times);
  CHECK_EQ(finished.load(), times * (1 + 2 + 3 + 4));
}
