// Bits of the gradient sum, against the recursive reference of gradient_reference.h.
#include "gradient_sum.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "gradient_reference.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

template <class F>
void for_each_dtype(F f) {
  f(Float32{});
  f(Float64{});
  f(BFloat16{});
  f(Float16{});
}

/// Runs f under every ISA of this machine.
template <class F>
void for_each_isa(F f) {
  for (const Isa isa : available_isas()) {
    set_isa(isa);
    f();
  }
  set_isa(best_isa());
}

/// Sums the whole, and the whole in random parts; both must be the reference.
template <class T>
void check_problem(Random& random, const Problem<T>& problem, const Tensor<T>& before) {
  const Tensor<T> expected = problem.expected(before);
  for_each_isa([&] {
    Tensor<T> out = before;
    sum_range(problem.segment(out), problem.depth, 0, out.size());
    CHECK(out == expected);
    Tensor<T> parts = before;
    for (std::size_t begin = 0; begin < parts.size();) {
      const std::size_t left = parts.size() - begin;
      const std::size_t end = begin + 1 + below(random, std::min<std::size_t>(left, 90));
      sum_range(problem.segment(parts), problem.depth, begin, end);
      begin = end;
    }
    CHECK(parts == expected);
  });
}

TEST(tree_is_the_documented_one) {
  const std::vector<float> v = {1e8f, 1.0f,  -1e8f, 3.3f, 1e-3f, 7e7f,
                                5.0f, -7e7f, 0.1f,  0.2f, 1e8f,  0.3f};
  std::vector<const void*> shards;
  for (const float& x : v) shards.push_back(&x);
  const float expected = (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) +
                         ((v[8] + v[9]) + (v[10] + v[11]));
  float out = 0;
  sum_range({DType::float32, &out, shards.data(), 1}, 1, 0, 1);
  CHECK_EQ(bit_cast<std::uint32_t>(out), bit_cast<std::uint32_t>(expected));
}

TEST(every_subset_of_twelve_children) {
  Random random(1);
  const Problem<Float32> all = random_problem<Float32>(random, 1, 37, 1.0);
  const Tensor<Float32> before = random_tensor<Float32>(random, 37);
  for (unsigned subset = 0; subset < 4096; ++subset) {
    Problem<Float32> problem;
    for (std::size_t k = 0; k < 12; ++k) {
      const bool here = subset >> k & 1;
      problem.tensor_of_shard.push_back(here ? static_cast<int>(problem.tensors.size()) : -1);
      if (here) problem.tensors.push_back(all.tensors[k]);
      problem.shards.push_back(here ? all.shards[k] : nullptr);
    }
    const Tensor<Float32> expected = problem.expected(before);
    for_each_isa([&] {
      Tensor<Float32> out = before;
      sum_range(problem.segment(out), 1, 0, out.size());
      CHECK(out == expected);
    });
  }
}

TEST(random_subsets_of_every_dtype_and_depth) {
  Random random(2);
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    for (int depth = 0; depth <= kMaxSumDepth; ++depth) {
      for (const double probability : {0.02, 0.3, 0.9, 1.0}) {
        for (int round = 0; round < (depth == 1 ? 25 : depth == 3 ? 1 : 6); ++round) {
          // Past 512 elements there is more than one block of absent values.
          const std::size_t numel = depth == 3 ? 21 : 1 + below(random, depth == 1 ? 1200 : 300);
          const auto problem = random_problem<T>(random, depth, numel, probability);
          check_problem(random, problem, random_tensor<T>(random, numel));
        }
      }
    }
  });
}

TEST(blocks_of_deep_trees) {
  Random random(3);
  const auto deep = random_problem<Float32>(random, 3, 1100, 0.1);
  check_problem(random, deep, random_tensor<Float32>(random, 1100));
  const auto wide = random_problem<Float64>(random, 2, 1100, 0.7);
  check_problem(random, wide, random_tensor<Float64>(random, 1100));
  const auto half = random_problem<Float16>(random, 2, 2100, 0.3);
  check_problem(random, half, random_tensor<Float16>(random, 2100));
}

TEST(every_length_and_alignment_of_a_short_range) {
  Random random(4);
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    const auto problem = random_problem<T>(random, 1, 140, 0.8);
    const Tensor<T> before = random_tensor<T>(random, 140);
    const Tensor<T> expected = problem.expected(before);
    for_each_isa([&] {
      for (std::size_t begin = 0; begin < 40; begin += 3) {
        for (std::size_t end = begin; end <= 140; ++end) {
          Tensor<T> out = before;
          sum_range(problem.segment(out), 1, begin, end);
          Tensor<T> outside = before;
          for (std::size_t i = begin; i < end; ++i) outside.set(i, expected.get(i));
          CHECK(out == outside);
        }
      }
    });
  });
}

TEST(out_may_be_any_one_of_the_shards) {
  Random random(5);
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    for (const int depth : {0, 1, 2}) {
      for (int round = 0; round < 14; ++round) {
        auto problem = random_problem<T>(random, depth, 333, round < 12 ? 0.8 : 0.05);
        if (problem.tensors.empty()) continue;
        const std::size_t which = below(random, problem.tensors.size());
        const Tensor<T> original = problem.tensors[which];
        const Tensor<T> expected = problem.expected(original);
        for_each_isa([&] {
          Tensor<T>& out = problem.tensors[which];
          for (std::size_t i = 0; i < original.size(); ++i) out.set(i, original.get(i));
          sum_range(problem.segment(out), depth, 0, 100);
          sum_range(problem.segment(out), depth, 100, 333);
          CHECK(out == expected);
        });
      }
    }
  });
}

/// Twelve shards that look into one long tensor, whose values come again after kPeriod of them, so
/// that large sums stay affordable.
template <class T>
void check_large(Random& random, std::size_t numel, unsigned subset) {
  constexpr std::size_t kPeriod = 10'007;  // no vector's or block's multiple
  Tensor<T> source(numel + 12 * 101, below(random, 16));
  for (std::size_t i = 0; i < source.size(); ++i) {
    source.set(i, i < kPeriod ? random_bits<T>(random, 0) : source.get(i - kPeriod));
  }
  std::vector<const void*> shards(12);
  for (std::size_t k = 0; k < 12; ++k) {
    const auto* start = static_cast<const std::uint8_t*>(source.data());
    shards[k] = subset >> k & 1 ? start + k * 101 * sizeof(typename T::Bits) : nullptr;
  }
  Tensor<T> expected(numel);
  for (std::size_t i = 0; i < numel; ++i) {
    if (i >= kPeriod) {
      expected.set(i, expected.get(i - kPeriod));
      continue;
    }
    std::array<Maybe<typename T::Sum>, 12> children;
    for (std::size_t k = 0; k < 12; ++k) {
      if (shards[k]) children[k] = {true, T::widen(source.get(i + k * 101))};
    }
    expected.set(i, T::round(add_twelve(children).value));
  }
  for_each_isa([&] {
    Tensor<T> out(numel, below(random, 40));
    const SumSegment segment{T::kDType, out.data(), shards.data(), numel};
    const std::size_t cut = below(random, numel);  // as two threads would, at the same time
    std::thread other([&] { sum_range(segment, 1, 0, cut); });
    sum_range(segment, 1, cut, numel);
    other.join();
    CHECK(out == expected);
  });
}

TEST(large_outputs_that_are_streamed_past_the_cache) {
  Random random(6);
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    const std::size_t numel = (std::size_t{4} << 20) / sizeof(typename T::Bits) + 77;
    check_large<T>(random, numel, 0xfff);
  });
  check_large<Float32>(random, (std::size_t{1} << 20) + 5, 0x5b7);
}

TEST(one_present_shard_is_copied_byte_for_byte) {
  Random random(7);
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    Tensor<T> shard(65536), out(65536);  // every bit pattern of the half types
    for (std::size_t i = 0; i < shard.size(); ++i) {
      shard.set(i, static_cast<typename T::Bits>(sizeof(typename T::Bits) == 2 ? i : random()));
    }
    for (const int depth : {0, 1, 2, 3}) {
      std::vector<const void*> shards(static_cast<std::size_t>(Topology::count(depth)));
      shards[below(random, shards.size())] = shard.data();
      for_each_isa([&] {
        out.fill(0);
        const SumSegment segment{T::kDType, out.data(), shards.data(), out.size()};
        sum_range(segment, depth, 0, out.size());
        CHECK(out == shard);
      });
    }
  });
}

TEST(every_half_pattern_survives_the_trip_through_float32) {
  Random random(8);
  auto check = [&](auto type) {
    using T = decltype(type);
    Problem<T> problem;
    problem.tensors.assign(2, Tensor<T>(65536));
    for (std::size_t i = 0; i < 65536; ++i) {
      problem.tensors[0].set(i, static_cast<std::uint16_t>(i));
      problem.tensors[1].set(i, 0x8000);  // -0.0
    }
    problem.shards.assign(12, nullptr);
    problem.tensor_of_shard.assign(12, -1);
    for (const std::size_t k : {3u, 9u}) {
      problem.tensor_of_shard[k] = k == 3 ? 0 : 1;
      problem.shards[k] = problem.tensors[k == 3 ? 0 : 1].data();
    }
    Tensor<T> zero(65536);
    zero.fill(0x8000);
    const Tensor<T> expected = problem.expected(zero);
    for (std::size_t i = 0; i < 65536; ++i) {
      const auto bits = static_cast<std::uint16_t>(i);
      CHECK(std::isnan(T::widen(bits)) || expected.get(i) == bits);
    }
    check_problem(random, problem, zero);
  };
  check(BFloat16{});
  check(Float16{});
}

TEST(float16_rounds_ties_and_overflow_as_the_standard_says) {
  auto sum_of = [](Float16::Bits a, Float16::Bits b) {
    const std::array<const void*, 12> shards = {&a, &b};
    Float16::Bits out = 0;
    sum_range({DType::float16, &out, shards.data(), 1}, 1, 0, 1);
    return out;
  };
  for_each_isa([&] {
    CHECK_EQ(sum_of(0x3c00, 0x1000), 0x3c00);  // 1 + 2^-11: a tie, down to even
    CHECK_EQ(sum_of(0x3c01, 0x1000), 0x3c02);  // a tie, up to even
    CHECK_EQ(sum_of(0x3c00, 0x1001), 0x3c01);  // just above
    CHECK_EQ(sum_of(0x7bff, 0x4c00), 0x7c00);  // 65504 + 16: a tie, up to infinity
    CHECK_EQ(sum_of(0x7bff, 0x4bff), 0x7bff);  // just below
    CHECK_EQ(sum_of(0xfbff, 0xfbff), 0xfc00);
    CHECK_EQ(sum_of(0x0001, 0x0001), 0x0002);  // subnormal
    CHECK_EQ(sum_of(0x03ff, 0x0001), 0x0400);  // subnormals to normal
    CHECK_EQ(sum_of(0x8000, 0x8000), 0x8000);  // -0.0
    CHECK_EQ(sum_of(0x0000, 0x8000), 0x0000);
    CHECK_EQ(sum_of(0x7c00, 0xfc00), 0x7e00);
    CHECK_EQ(sum_of(0x7c01, 0x3c00), 0x7e00);
  });
}

TEST(every_half_plus_half_an_ulp_of_it) {
  Random random(9);
  auto check = [&](auto type, int fraction) {
    using T = decltype(type);
    Problem<T> problem;
    problem.tensors.assign(12, Tensor<T>(65536));
    for (std::size_t k = 0; k < 12; ++k) {
      problem.shards.push_back(problem.tensors[k].data());
      problem.tensor_of_shard.push_back(static_cast<int>(k));
      for (std::size_t i = 0; i < 65536; ++i) problem.tensors[k].set(i, 0x8000);
    }
    for (std::size_t i = 0; i < 65536; ++i) {
      const int exponent = static_cast<int>(i & 0x7fff) >> fraction;
      const int half_ulp = std::max(exponent - fraction - 1, 0) << fraction;
      problem.tensors[0].set(i, static_cast<std::uint16_t>(i));
      problem.tensors[7].set(i, static_cast<std::uint16_t>(half_ulp | (random() & 0x8000)));
      problem.tensors[11].set(i, static_cast<std::uint16_t>(random() % 3));  // sticky bits
    }
    check_problem(random, problem, Tensor<T>(65536));
  };
  check(BFloat16{}, 7);
  check(Float16{}, 10);
}

TEST(half_types_round_once_at_the_root) {
  // 2048 + 1 is a tie in float16 (the spacing is 2) and would round down 143 times over.
  std::vector<Float16::Bits> values(144, 0x3c00);
  values[0] = 0x6800;
  std::vector<const void*> shards;
  for (const auto& value : values) shards.push_back(&value);
  Float16::Bits out = 0;
  for_each_isa([&] {
    sum_range({DType::float16, &out, shards.data(), 1}, 2, 0, 1);
    CHECK_EQ(out, Float16::round(2048.0f + 143.0f));
  });
}

TEST(no_present_shard_leaves_the_output_alone) {
  for (const int depth : {0, 1, 2, 3}) {
    const std::vector<const void*> shards(static_cast<std::size_t>(Topology::count(depth)));
    float out = 5;
    sum_range({DType::float32, &out, shards.data(), 1}, depth, 0, 1);
    CHECK_EQ(out, 5.0f);
  }
}

TEST(an_isa_that_this_machine_lacks_is_named) {
  const auto available = available_isas();
  CHECK(available.front() == Isa::baseline);
  CHECK(available.back() == best_isa());
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    const bool has = std::find(available.begin(), available.end(), isa) != available.end();
    std::string message;
    try {
      set_isa(isa);
      CHECK(active_isa() == isa);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    CHECK_EQ(message.empty(), has);
    CHECK(has || message.find(isa_name(isa)) != std::string::npos);
  }
  set_isa(best_isa());
  CHECK(active_isa() == best_isa());
}

}  // namespace
