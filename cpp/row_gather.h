// Gathers rows that lie anywhere in memory into batches: what a loader of tensors does.
//
//     GatherJob job;
//     job.add({addresses, rows, row_bytes, out});   // rows stay alive until the job has run
//     job.run_here();                               // or GatherWork(job) for the spheres
//
// Pieces are runs of rows of one column, large enough that a claim costs nothing beside them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "claimer.h"

namespace torch_spheres {

/// One output: row i comes from addresses[i].
struct GatherColumn {
  const std::int64_t* addresses;
  std::size_t rows, row_bytes;
  char* out;
};

class GatherJob {
 public:
  void add(const GatherColumn& column) {
    const std::size_t index = columns_.size();
    columns_.push_back(column);
    bytes_ += column.rows * column.row_bytes;
    const std::size_t rows =
        std::max<std::size_t>(1, kPieceBytes / std::max<std::size_t>(column.row_bytes, kRowCost));
    for (std::size_t begin = 0; begin < column.rows; begin += rows) {
      pieces_.push_back({index, begin, std::min(column.rows, begin + rows)});
    }
  }

  std::size_t bytes() const { return bytes_; }
  std::int64_t items() const { return static_cast<std::int64_t>(pieces_.size()); }

  void run_item(std::int64_t item) const {
    const Piece& piece = pieces_[static_cast<std::size_t>(item)];
    const GatherColumn& column = columns_[piece.column];
    // A row of a few bytes is one load and one store; memcpy of a size known only here is a call.
    switch (column.row_bytes) {
      case 0:
        return;
      case 1:
        return copy<1>(column, piece);
      case 2:
        return copy<2>(column, piece);
      case 4:
        return copy<4>(column, piece);
      case 8:
        return copy<8>(column, piece);
      default:
        for (std::size_t i = piece.begin; i < piece.end; ++i) {
          // Rows of a shuffled batch are nowhere near each other: ask for them ahead of time.
          if (i + kAhead < piece.end) prefetch(column.addresses[i + kAhead], column.row_bytes);
          std::memcpy(column.out + i * column.row_bytes, source(column, i), column.row_bytes);
        }
    }
  }
  void run_here() const {
    for (std::int64_t item = 0; item < items(); ++item) run_item(item);
  }

 private:
  struct Piece {
    std::size_t column, begin, end;
  };
  static constexpr std::size_t kPieceBytes = 64 << 10;
  static constexpr std::size_t kRowCost = 64;  // a row is a cache line at least
  static constexpr std::size_t kAhead = 2;     // rows

  static const void* source(const GatherColumn& column, std::size_t row) {
    return reinterpret_cast<const void*>(column.addresses[row]);
  }
  static void prefetch(std::int64_t address, std::size_t bytes) {
    constexpr std::size_t kLine = 64, kLines = 8;  // the hardware goes on from there
    const char* row = reinterpret_cast<const char*>(address);
    for (std::size_t i = 0; i < std::min(bytes, kLine * kLines); i += kLine) {
      __builtin_prefetch(row + i);
    }
  }
  template <std::size_t kBytes>
  static void copy(const GatherColumn& column, const Piece& piece) {
    for (std::size_t i = piece.begin; i < piece.end; ++i) {
      std::memcpy(column.out + i * kBytes, source(column, i), kBytes);
    }
  }

  std::vector<GatherColumn> columns_;
  std::vector<Piece> pieces_;
  std::size_t bytes_ = 0;
};

class GatherWork final : public Work {
 public:
  explicit GatherWork(const GatherJob& job) : job_(job) {}
  void run(Claimer& claimer) override {
    Chunk chunk;
    while (claimer.next(chunk)) {
      for (std::int64_t i = 0; i < chunk.count; ++i) {
        job_.run_item(chunk.first + i * chunk.stride);
        pieces_done_.fetch_add(1, std::memory_order_relaxed);
      }
    }
  }
  TraceLabel label() const override { return TraceLabel::kGather; }
  /// A moving figure, to see whether anybody is at it.
  std::int64_t was_done() const { return pieces_done_.load(std::memory_order_relaxed); }

 private:
  const GatherJob& job_;
  std::atomic<std::int64_t> pieces_done_{0};
};

}  // namespace torch_spheres
