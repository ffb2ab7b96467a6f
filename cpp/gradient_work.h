// A list of gradient sums, cut into pieces that spheres take as work items.
//
//     SumJob job(depth);                      // 12^depth shards
//     job.add(segment); ...                   // buffers stay alive until the job has run
//     job.run_here();                         // or hand std::make_shared<SumWork>(job) to spheres
//
// Every element is summed by sum_range alone, so neither the pieces nor who takes them can change
// a bit.  Small tensors share a piece; a large one is cut into several.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "gradient_sum.h"
#include "piece_work.h"

namespace torch_spheres {

class SumJob {
 public:
  static constexpr State kState = State::kAccumulating;
  static constexpr TraceLabel kLabel = TraceLabel::kSumPiece;

  explicit SumJob(int depth) : depth_(depth), leaves_(std::size_t(Topology::count(depth))) {}

  int depth() const { return depth_; }
  std::size_t leaves() const { return leaves_; }

  /// `shards` holds leaves() pointers, null for absent ones; segment.shards is ignored.
  void add(const SumSegment& segment, const std::vector<const void*>& shards) {
    shards_.insert(shards_.end(), shards.begin(), shards.end());
    segments_.push_back(segment);
    const std::size_t index = segments_.size() - 1;
    const std::size_t element = element_size(segment.dtype) * leaves_;  // bytes read for one
    bytes_ += segment.numel * element;
    for (std::size_t begin = 0; begin < segment.numel;) {
      if (items_.empty() || filled_ >= kItemBytes) {
        items_.push_back(pieces_.size());
        filled_ = 0;
      }
      const std::size_t room = std::max(kLeastElements, (kItemBytes - filled_) / element);
      const std::size_t end = std::min(segment.numel, begin + room);
      pieces_.push_back({index, begin, end});
      filled_ += (end - begin) * element;
      begin = end;
    }
  }

  /// Bytes that the sum reads if no shard is absent.
  std::size_t bytes() const { return bytes_; }
  std::int64_t items() const { return static_cast<std::int64_t>(items_.size()); }

  void run_item(std::int64_t item) const {
    const auto i = static_cast<std::size_t>(item);
    const std::size_t last = i + 1 < items_.size() ? items_[i + 1] : pieces_.size();
    for (std::size_t p = items_[i]; p < last; ++p) {
      sum_range(segment(pieces_[p].segment), depth_, pieces_[p].begin, pieces_[p].end);
    }
  }
  void run_here() const {
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      sum_range(segment(i), depth_, 0, segments_[i].numel);
    }
  }

 private:
  /// Large enough that a claim costs nothing beside it, small enough to spread over many spheres.
  static constexpr std::size_t kItemBytes = 384 << 10;
  /// With fewer of each of many shards the memory's rows are left before they are worth opening.
  static constexpr std::size_t kLeastElements = 1024;
  struct Piece {
    std::size_t segment, begin, end;
  };
  /// With its pointers, which move while segments are added.
  SumSegment segment(std::size_t index) const {
    SumSegment whole = segments_[index];
    whole.shards = shards_.data() + index * leaves_;
    return whole;
  }

  const int depth_;
  const std::size_t leaves_;
  std::vector<SumSegment> segments_;
  std::vector<const void*> shards_;  // leaves_ for each segment
  std::vector<Piece> pieces_;
  std::vector<std::size_t> items_;  // first piece of each item
  std::size_t filled_ = 0;          // bytes that the last item reads
  std::size_t bytes_ = 0;
};

using SumWork = PieceWork<SumJob>;

}  // namespace torch_spheres
