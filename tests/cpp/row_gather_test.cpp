#include "row_gather.h"

#include "helper.h"
#include "system_support.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

/// Rows of `bytes` each, every byte known from its row, and a batch that takes them backwards.
struct Rows {
  Rows(std::size_t count, std::size_t row_bytes) : bytes(row_bytes), data(count * row_bytes) {
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = value(i / bytes, i % bytes);
    for (std::size_t i = 0; i < count; ++i) {
      const char* row = data.data() + (count - 1 - i) * bytes;
      addresses.push_back(reinterpret_cast<std::int64_t>(row));
    }
    out.assign(data.size(), 0);
  }
  static char value(std::size_t row, std::size_t place) {
    return static_cast<char>(row * 31 + place * 7 + 1);
  }
  GatherColumn column() { return {addresses.data(), addresses.size(), 0, 1, bytes, out.data()}; }
  bool gathered() const {
    const std::size_t count = addresses.size();
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (out[i] != value(count - 1 - i / bytes, i % bytes)) return false;
    }
    return true;
  }

  std::size_t bytes;
  std::vector<char> data, out;
  std::vector<std::int64_t> addresses;
};

}  // namespace

TEST(rows_of_any_size_are_gathered) {
  for (std::size_t bytes : {1u, 2u, 3u, 4u, 7u, 8u, 12u, 64u, 3136u, 70000u}) {
    for (std::size_t count : {0u, 1u, 2u, 5u, 1000u}) {
      if (bytes * count > 1u << 20) continue;
      Rows rows(count, bytes);
      GatherWork work;
      work.add(rows.column());
      CHECK_EQ(work.bytes(), bytes * count);
      work.run_here();
      CHECK(rows.gathered());
    }
  }
}

TEST(rows_without_bytes_are_nothing) {
  Rows rows(3, 1);
  GatherWork work;
  work.add({rows.addresses.data(), 3, 0, 1, 0, rows.out.data()});
  work.run_here();
  for (char byte : rows.out) CHECK_EQ(byte, 0);
}

TEST(spheres_gather_several_columns_at_once) {
  for (int concurrency : {1, 2, 12}) {
    System system(2, concurrency);
    system.start();
    for (int repeat = 0; repeat < rounds(4); ++repeat) {
      Rows wide(300, 3000), narrow(3000, 8), odd(500, 17);
      const auto work = std::make_shared<GatherWork>();
      for (Rows* rows : {&wide, &narrow, &odd}) work->add(rows->column());
      const auto batch = submit(system, work, work->items());
      Helper helper(system);
      CHECK(helper.wait_for(*batch, kPatience));
      CHECK(wide.gathered() && narrow.gathered() && odd.gathered());
    }
  }
}

TEST(a_batch_that_is_given_up_leaves_its_memory_alone) {
  for (int concurrency : {1, 2, 12}) {
    System system(2, concurrency);
    system.start();
    for (int repeat = 0; repeat < rounds(6); ++repeat) {
      const auto rows = std::make_unique<Rows>(700, 1000);
      const auto work = std::make_shared<GatherWork>();
      work->add(rows->column());
      const auto batch = submit(system, work, work->items());
      if (repeat % 2 == 1) {  // somewhere in the middle
        while (work->was_done() == 0) std::this_thread::yield();
      }
      system.cancel(batch);
      CHECK(batch->wait_for(kPatience));
      CHECK_EQ(work->was_done() + batch->cancelled(), work->items());
      // Nobody writes any more: the sanitizers would see it.
      std::fill(rows->out.begin(), rows->out.end(), 0);
      work->run_here();
      CHECK(rows->gathered());
    }
  }
}
