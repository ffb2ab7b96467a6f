// Bits of the gradient sum, against a plain recursive reference that shares no code with it.
// Compile with -ffp-contract=off, like gradient_sum.cpp.
#include "gradient_sum.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

using namespace torch_spheres;

namespace {

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

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t n) { return random() % n; }

/// Elements of column i have one flavour, so that infinities do not swallow everything else.
template <class T>
typename T::Bits random_bits(Random& random, std::size_t i) {
  using Limits = std::numeric_limits<typename T::Sum>;
  std::normal_distribution<double> normal;
  const double sign = random() % 2 ? 1 : -1;
  double value = normal(random);
  switch (i % 6) {
    case 0: break;
    case 1: return static_cast<typename T::Bits>(random());  // anything, NaNs included
    case 2: value = sign * 0.0; break;
    case 3: value = std::ldexp(value, static_cast<int>(below(random, 40)) - 20); break;
    case 4: value = random() % 4 ? sign * 30000 : value; break;  // cancels
    default: value = random() % 16 ? sign * Limits::denorm_min() * 3 : sign * Limits::infinity();
  }
  return T::round(static_cast<typename T::Sum>(value));
}

/// Elements in bytes of their own, `shift` elements past an aligned address.
template <class T>
class Tensor {
 public:
  using Bits = typename T::Bits;
  explicit Tensor(std::size_t n, std::size_t shift = 0) : n_(n), bytes_((n + shift) * sizeof(Bits) + 64) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    start_ = (64 - address % 64) % 64 + shift * sizeof(Bits);
    bytes_.resize(start_ + n * sizeof(Bits));  // ends here: AddressSanitizer sees a read past it
    bytes_.shrink_to_fit();
    const auto moved = reinterpret_cast<std::uintptr_t>(bytes_.data());
    if (moved != address) {  // the shrunk copy need not be aligned alike: any element address will do
      start_ = 0;
      bytes_.resize(n * sizeof(Bits));
    }
  }
  std::size_t size() const { return n_; }
  void* data() { return bytes_.data() + start_; }
  Bits get(std::size_t i) const {
    Bits bits;
    std::memcpy(&bits, bytes_.data() + start_ + i * sizeof bits, sizeof bits);
    return bits;
  }
  void set(std::size_t i, Bits bits) {
    std::memcpy(bytes_.data() + start_ + i * sizeof bits, &bits, sizeof bits);
  }
  std::vector<Bits> values() const {
    std::vector<Bits> all(n_);
    for (std::size_t i = 0; i < n_; ++i) all[i] = get(i);
    return all;
  }

 private:
  std::size_t n_;
  std::size_t start_ = 0;
  std::vector<std::uint8_t> bytes_;
};
}  // namespace
