// Reads memory and does nothing with it: the bandwidth that bench_gradients.py compares sums with.
#include <cstddef>
#include <cstring>

using Vector = float __attribute__((vector_size(64)));

/// The sum of n floats, in no particular order.
extern "C" double read_range(const float* data, std::size_t n) {
  // Four places at once, as one stream does not keep the memory busy on every machine.
  constexpr std::size_t kLanes = sizeof(Vector) / sizeof(float);
  constexpr std::size_t kPlaces = 4;
  const std::size_t part = n / kPlaces / kLanes * kLanes;
  Vector sums[kPlaces] = {};
  for (std::size_t i = 0; i < part; i += kLanes) {
    for (std::size_t p = 0; p < kPlaces; ++p) {
      Vector read;
      std::memcpy(&read, data + p * part + i, sizeof read);
      sums[p] += read;
    }
  }
  const Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
  for (std::size_t i = part * kPlaces; i < n; ++i) total += data[i];
  return total;
}
