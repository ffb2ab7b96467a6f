// What the gradient sum must give, from plain recursion and the definitions of the number formats.
// Shares no code with cpp/gradient_sum.cpp; compile with -ffp-contract=off, like it.
//
//     auto problem = random_problem<Float16>(random, 2, 100, 0.5);   // half of 144 shards present
//     Tensor<Float16> expected = problem.expected(before);           // before: what out holds
//     sum_range(problem.segment(out), problem.depth, 0, 100);        // out == expected
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gradient_sum.h"

namespace torch_spheres::testing {

// ---- Element types: Bits is what a tensor holds, Sum what is added.

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Float32 {
  static constexpr DType kDType = DType::float32;
  using Bits = std::uint32_t;
  using Sum = float;
  static Sum widen(Bits bits) { return bit_cast<float>(bits); }
  static Bits round(Sum sum) { return std::isnan(sum) ? 0x7fc00000u : bit_cast<Bits>(sum); }
};

struct Float64 {
  static constexpr DType kDType = DType::float64;
  using Bits = std::uint64_t;
  using Sum = double;
  static Sum widen(Bits bits) { return bit_cast<double>(bits); }
  static Bits round(Sum sum) { return std::isnan(sum) ? 0x7ff8ull << 48 : bit_cast<Bits>(sum); }
};

/// A 16-bit format by its definition, in exact double arithmetic.
template <DType kType, int kFraction, int kMinExponent>
struct Half {
  static constexpr DType kDType = kType;
  using Bits = std::uint16_t;
  using Sum = float;
  static constexpr int kInfinity = 0x7fff >> kFraction << kFraction;

  static Sum widen(Bits bits) {
    const int magnitude = bits & 0x7fff;
    const int exponent = magnitude >> kFraction;
    const int fraction = magnitude - (exponent << kFraction);
    double value = 0;
    if (magnitude > kInfinity) {
      value = std::numeric_limits<double>::quiet_NaN();
    } else if (magnitude == kInfinity) {
      value = std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
      value = std::ldexp(fraction, kMinExponent - kFraction);
    } else {
      value = std::ldexp(fraction + (1 << kFraction), kMinExponent - kFraction + exponent - 1);
    }
    return static_cast<Sum>(bits & 0x8000 ? -value : value);
  }

  static Bits round(Sum sum) {
    if (std::isnan(sum)) return static_cast<Bits>(kInfinity | 1 << (kFraction - 1));
    const int sign = std::signbit(sum) ? 0x8000 : 0;
    if (std::isinf(sum)) return static_cast<Bits>(sign | kInfinity);
    const double value = std::fabs(static_cast<double>(sum));
    const int exponent = value == 0 ? kMinExponent : std::max(std::ilogb(value), kMinExponent);
    // In units of the last place, ties to even; a carry into the exponent is just the next number.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(value, kFraction - exponent)));
    const int magnitude = ((exponent - kMinExponent) << kFraction) + units;
    return static_cast<Bits>(sign | std::min(magnitude, kInfinity));
  }
};
using BFloat16 = Half<DType::bfloat16, 7, -126>;
using Float16 = Half<DType::float16, 10, -14>;

using Random = std::mt19937_64;

inline std::size_t below(Random& random, std::size_t n) { return random() % n; }

/// Elements of column i have one flavour, so that infinities do not swallow everything else.
template <class T>
typename T::Bits random_bits(Random& random, std::size_t i) {
  using Limits = std::numeric_limits<typename T::Sum>;
  std::normal_distribution<double> normal;
  const double sign = random() % 2 ? 1 : -1;
  double value = normal(random);
  switch (i % 6) {
    case 0:
      break;
    case 1:
      return static_cast<typename T::Bits>(random());  // anything, NaNs included
    case 2:
      value = sign * 0.0;
      break;
    case 3:
      value = std::ldexp(value, static_cast<int>(below(random, 40)) - 20);
      break;
    case 4:
      value = random() % 4 ? sign * 30000 : value;
      break;  // cancels
    default:
      value = random() % 16 ? sign * Limits::denorm_min() * 3 : sign * Limits::infinity();
  }
  return T::round(static_cast<typename T::Sum>(value));
}

/// n elements that begin `shift` elements after, and end with, an allocation of their own, so that
/// AddressSanitizer sees every access past the end.
template <class T>
class Tensor {
 public:
  using Bits = typename T::Bits;
  explicit Tensor(std::size_t n, std::size_t shift = 0)
      : start_(shift * sizeof(Bits)), bytes_(start_ + n * sizeof(Bits)) {}

  std::size_t size() const { return (bytes_.size() - start_) / sizeof(Bits); }
  void* data() { return bytes_.data() + start_; }
  const void* data() const { return bytes_.data() + start_; }
  Bits get(std::size_t i) const {
    Bits bits;
    std::memcpy(&bits, bytes_.data() + start_ + i * sizeof bits, sizeof bits);
    return bits;
  }
  void set(std::size_t i, Bits bits) {
    std::memcpy(bytes_.data() + start_ + i * sizeof bits, &bits, sizeof bits);
  }
  void fill(Bits bits) {
    for (std::size_t i = 0; i < size(); ++i) set(i, bits);
  }
  bool operator==(const Tensor& other) const {
    return size() == other.size() && std::memcmp(data(), other.data(), size() * sizeof(Bits)) == 0;
  }

 private:
  std::size_t start_;
  std::vector<std::uint8_t> bytes_;
};

template <class T>
Tensor<T> random_tensor(Random& random, std::size_t n) {
  Tensor<T> tensor(n, below(random, 20));
  for (std::size_t i = 0; i < n; ++i) tensor.set(i, random_bits<T>(random, i));
  return tensor;
}

// ---- The reference

template <class Sum>
struct Maybe {
  bool present = false;
  Sum value{};
};

template <class Sum>
Maybe<Sum> add(Maybe<Sum> a, Maybe<Sum> b) {
  if (!a.present) return b;
  if (!b.present) return a;
  return {true, a.value + b.value};
}

template <class Sum>
Maybe<Sum> add_twelve(const std::array<Maybe<Sum>, 12>& c) {
  return add(add(add(add(c[0], c[1]), add(c[2], c[3])), add(add(c[4], c[5]), add(c[6], c[7]))),
             add(add(c[8], c[9]), add(c[10], c[11])));
}

/// Some shards of one tensor, and what to do with them.
template <class T>
struct Problem {
  int depth = 1;
  std::vector<Tensor<T>> tensors;  // of the present shards
  std::vector<const void*> shards;
  std::vector<int> tensor_of_shard;  // -1: absent

  using Sum = typename T::Sum;
  using Bits = typename T::Bits;

  std::size_t numel() const { return tensors.empty() ? 0 : tensors[0].size(); }

  Maybe<Sum> node(const std::vector<int>& path, std::size_t i) const {
    if (static_cast<int>(path.size()) == depth) {
      int shard = 0;
      for (auto digit = path.rbegin(); digit != path.rend(); ++digit) shard = shard * 12 + *digit;
      const int tensor = tensor_of_shard[static_cast<std::size_t>(shard)];
      if (tensor < 0) return {};
      return {true, T::widen(tensors[static_cast<std::size_t>(tensor)].get(i))};
    }
    std::array<Maybe<Sum>, 12> children;
    for (int c = 0; c < 12; ++c) {
      std::vector<int> below_path = path;
      below_path.push_back(c);
      children[static_cast<std::size_t>(c)] = node(below_path, i);
    }
    return add_twelve(children);
  }

  Bits expected(std::size_t i, Bits before) const {
    if (tensors.empty()) return before;
    if (tensors.size() == 1) return tensors[0].get(i);
    return T::round(node({}, i).value);
  }

  Tensor<T> expected(const Tensor<T>& before) const {
    Tensor<T> out(before.size());
    for (std::size_t i = 0; i < before.size(); ++i) out.set(i, expected(i, before.get(i)));
    return out;
  }

  SumSegment segment(Tensor<T>& out) const {
    return {T::kDType, out.data(), shards.data(), out.size()};
  }
};

/// Shard k is present with the given probability; the tensors have numel elements.
template <class T>
Problem<T> random_problem(Random& random, int depth, std::size_t numel, double probability) {
  Problem<T> problem;
  problem.depth = depth;
  std::bernoulli_distribution present(probability);
  for (int k = 0; k < Topology::count(depth); ++k) {
    const bool here = present(random);
    problem.tensor_of_shard.push_back(here ? static_cast<int>(problem.tensors.size()) : -1);
    if (here) problem.tensors.push_back(random_tensor<T>(random, numel));
    problem.shards.push_back(here ? problem.tensors.back().data() : nullptr);
  }
  return problem;
}

}  // namespace torch_spheres::testing
