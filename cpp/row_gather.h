// Gathers rows that lie anywhere in memory into batches: what a loader of tensors does.
//
//     GatherWork work;
//     work.add({numbers, rows, table, row_bytes, row_bytes, out});  // live until it is done
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "piece_work.h"

namespace torch_spheres {

/// One output: its row i comes from `stride * numbers[i]` bytes behind `table`.  (With no table and
/// a stride of 1 the numbers are addresses: rows of several tables.)
struct GatherColumn {
  static constexpr State kState = State::kProcessing;
  static constexpr TraceLabel kLabel = TraceLabel::kGather;
  static constexpr bool kShareItems = false;
  static constexpr std::size_t kItemBytes = 64 << 10;
  static constexpr std::size_t kLeastElements = 1;
  static constexpr std::size_t kLeastElementBytes = 64;  // a row is a cache line at least

  const std::int64_t* numbers;
  std::size_t rows;
  std::uintptr_t table;
  std::size_t stride, row_bytes;
  char* out;

  std::size_t size() const { return rows; }
  std::size_t element_bytes() const { return row_bytes; }
  void run(std::size_t begin, std::size_t end) const {
    // A row of a few bytes is one load and one store; memcpy of a size known only here is a call.
    switch (row_bytes) {
      case 0:
        return;
      case 1:
        return copy<1>(begin, end);
      case 2:
        return copy<2>(begin, end);
      case 4:
        return copy<4>(begin, end);
      case 8:
        return copy<8>(begin, end);
      default:
        for (std::size_t i = begin; i < end; ++i) {
          // Rows of a shuffled batch are nowhere near each other: ask for them ahead of time.
          if (i + kAhead < end) prefetch(source(i + kAhead));
          std::memcpy(out + i * row_bytes, source(i), row_bytes);
        }
    }
  }

 private:
  static constexpr std::size_t kAhead = 2;  // rows

  const char* source(std::size_t row) const {
    return reinterpret_cast<const char*>(table + stride * static_cast<std::size_t>(numbers[row]));
  }
  void prefetch(const char* row) const {
    constexpr std::size_t kLine = 64, kLines = 64;  // a page; the hardware goes on from there
    for (std::size_t i = 0; i < std::min(row_bytes, kLine * kLines); i += kLine) {
      __builtin_prefetch(row + i);
    }
  }
  template <std::size_t kBytes>
  void copy(std::size_t begin, std::size_t end) const {
    for (std::size_t i = begin; i < end; ++i) std::memcpy(out + i * kBytes, source(i), kBytes);
  }
};
using GatherWork = PieceWork<GatherColumn>;

}  // namespace torch_spheres
