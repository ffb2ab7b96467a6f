// Work on large pieces of memory that spheres share: a gradient sum, a gathered batch.
//
//     auto work = std::make_shared<PieceWork<Part>>();
//     work->add(part); ...                        // its memory lives until the work is done
//     work->run_here();                           // or, on spheres:
//     system.try_submit(std::make_shared<Batch>(work, work->items()));
//
// A Part is a row of equal elements, any of which can be done alone and by anybody:
//     std::size_t size(), element_bytes();        how many, and what one moves through memory
//     void run(std::size_t begin, std::size_t end);
//     kState, kLabel                              of whoever runs it
//     kItemBytes                                  large enough that a claim costs nothing beside it
//     kLeastElements, kLeastElementBytes          of a piece, and what an element costs at least
//     kShareItems                                 whether small parts share an item
// A large part is cut into several items.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "claimer.h"

namespace torch_spheres {

template <typename Part>
class PieceWork final : public Work {
 public:
  /// Before the work is handed out.
  void add(Part part) {
    const std::size_t size = part.size();
    const std::size_t element = std::max(part.element_bytes(), Part::kLeastElementBytes);
    bytes_ += size * part.element_bytes();
    parts_.push_back(std::move(part));  // first, so that no piece is without its part
    for (std::size_t begin = 0; begin < size;) {
      if (!Part::kShareItems || items_.empty() || filled_ >= Part::kItemBytes) {
        items_.push_back(pieces_.size());
        filled_ = 0;
      }
      const std::size_t room =
          std::max(Part::kLeastElements, (Part::kItemBytes - filled_) / element);
      const std::size_t end = std::min(size, begin + room);
      pieces_.push_back({parts_.size() - 1, begin, end});
      filled_ += (end - begin) * element;
      begin = end;
    }
  }

  /// Of all parts.
  std::size_t bytes() const { return bytes_; }
  std::int64_t items() const { return static_cast<std::int64_t>(items_.size()); }
  /// A moving figure, to see whether anybody is at it.
  std::int64_t was_done() const { return items_done_.load(std::memory_order_relaxed); }

  void run_here() const {
    for (const Part& part : parts_) part.run(0, part.size());
  }
  void run(Claimer& claimer) override {
    Chunk chunk;
    while (claimer.next(chunk)) {
      for (std::int64_t i = 0; i < chunk.count; ++i) {
        run_item(static_cast<std::size_t>(chunk.first + i * chunk.stride));
        items_done_.fetch_add(1, std::memory_order_relaxed);
      }
    }
  }
  State state() const override { return Part::kState; }
  TraceLabel label() const override { return Part::kLabel; }

 private:
  struct Piece {
    std::size_t part, begin, end;
  };
  void run_item(std::size_t item) const {
    const std::size_t last = item + 1 < items_.size() ? items_[item + 1] : pieces_.size();
    for (std::size_t p = items_[item]; p < last; ++p) {
      parts_[pieces_[p].part].run(pieces_[p].begin, pieces_[p].end);
    }
  }

  std::vector<Part> parts_;
  std::vector<Piece> pieces_;
  std::vector<std::size_t> items_;  // first piece of each
  std::size_t filled_ = 0;          // what the last item's pieces cost, in bytes
  std::size_t bytes_ = 0;
  std::atomic<std::int64_t> items_done_{0};
};

}  // namespace torch_spheres
