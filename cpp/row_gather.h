// Gathers rows that lie anywhere in memory into batches: what a loader of tensors does.
//
//     GatherJob job;
//     job.add({numbers, rows, table, row_bytes, row_bytes, out});  // live until the job has run
//     job.run_here();                                              // or GatherWork(job) on spheres
//
// Pieces are runs of rows of one column, large enough that a claim costs nothing beside them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "piece_work.h"

namespace torch_spheres {

/// One output: its row i comes from `stride * numbers[i]` bytes behind `table`.  (With no table and
/// a stride of 1 the numbers are addresses: rows of several tables.)
struct GatherColumn {
  const std::int64_t* numbers;
  std::size_t rows;
  std::uintptr_t table;
  std::size_t stride, row_bytes;
  char* out;
  const char* source(std::size_t row) const {
    return reinterpret_cast<const char*>(table + stride * static_cast<std::size_t>(numbers[row]));
  }
};

class GatherJob {
 public:
  static constexpr State kState = State::kProcessing;
  static constexpr TraceLabel kLabel = TraceLabel::kGather;

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
          if (i + kAhead < piece.end) prefetch(column.source(i + kAhead), column.row_bytes);
          std::memcpy(column.out + i * column.row_bytes, column.source(i), column.row_bytes);
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

  static void prefetch(const char* row, std::size_t bytes) {
    constexpr std::size_t kLine = 64, kLines = 64;  // a page; the hardware goes on from there
    for (std::size_t i = 0; i < std::min(bytes, kLine * kLines); i += kLine) {
      __builtin_prefetch(row + i);
    }
  }
  template <std::size_t kBytes>
  static void copy(const GatherColumn& column, const Piece& piece) {
    for (std::size_t i = piece.begin; i < piece.end; ++i) {
      std::memcpy(column.out + i * kBytes, column.source(i), kBytes);
    }
  }

  std::vector<GatherColumn> columns_;
  std::vector<Piece> pieces_;
  std::size_t bytes_ = 0;
};

using GatherWork = PieceWork<GatherJob>;

}  // namespace torch_spheres
