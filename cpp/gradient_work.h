// Gradient sums that spheres share.  Every element is summed by sum_range alone, so neither the
// pieces nor who takes them can change a bit.
#pragma once

#include <cstddef>
#include <vector>

#include "gradient_sum.h"
#include "piece_work.h"

namespace torch_spheres {

/// One tensor to sum.
struct SumPart {
  static constexpr State kState = State::kAccumulating;
  static constexpr TraceLabel kLabel = TraceLabel::kSumPiece;
  static constexpr bool kShareItems = true;
  /// Small enough to spread over many spheres.
  static constexpr std::size_t kItemBytes = 384 << 10;
  /// With fewer of each of many shards the memory's rows are left before they are worth opening.
  static constexpr std::size_t kLeastElements = 1024;
  static constexpr std::size_t kLeastElementBytes = 1;

  DType dtype;
  void* out;
  std::vector<const void*> shards;  // 12^depth, as in SumSegment
  std::size_t numel;
  int depth;

  std::size_t size() const { return numel; }
  /// What is read for one if no shard is absent.
  std::size_t element_bytes() const { return element_size(dtype) * shards.size(); }
  void run(std::size_t begin, std::size_t end) const {
    sum_range({dtype, out, shards.data(), numel}, depth, begin, end);
  }
};
using SumWork = PieceWork<SumPart>;

}  // namespace torch_spheres
