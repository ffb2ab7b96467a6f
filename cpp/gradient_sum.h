// Sums the gradients of 12^depth shards up the hierarchy, in one pass over the memory.
//
//     const void* shards[12] = {...};                       // null: that shard has no gradient
//     SumSegment s{DType::float32, grad, shards, numel};    // grad may be one of the shards
//     sum_range(s, 1, 0, numel);                            // or parts of it, on several threads
//
// Any thread may call anything here; nothing is allocated, locked or kept.  Ranges of one segment
// may be summed at the same time when they do not overlap.
//
// Order.  A node adds its twelve children as
//     (((c0+c1)+(c2+c3)) + ((c4+c5)+(c6+c7))) + ((c8+c9)+(c10+c11))
// and passes one value up.  Shard k is at the end of the path that k spells in base 12, least
// significant digit first: the root's child g is made of the shards with k % 12 == g, that one's
// child c of those with k / 12 % 12 == c.  What is absent is left out of the tree: a pair with one
// absent child is the other child, a node without children is itself absent.
//
// Same bits.  Each element's additions are those of the tree above, none merged, reordered or
// fused, whatever the ISA, the alignment, or the ranges that the segment is cut into.
//  - float32 and float64 are added in their own type; bfloat16 and float16 in float32 through all
//    levels, then rounded once (to nearest, ties to even; too large is infinite).
//  - A result that is not a number is always the same one (positive, quiet, no payload): which
//    operand's payload survives an addition is the compiler's choice, and so the ISA's.
//  - One present shard in the whole tree is copied byte for byte.
//  - Like torch's own kernels, the sums obey the calling thread's floating-point mode: with
//    torch.set_flush_denormal(True) on some threads only, bits depend on who computes.
// This needs -ffp-contract=off and no -ffast-math.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "topology.h"

namespace torch_spheres {

enum class DType : std::uint8_t { float32, float64, bfloat16, float16 };

std::size_t element_size(DType dtype);

/// Levels that can be summed: 1, 12, 144 or 1728 shards.
inline constexpr int kMaxSumDepth = kMaxLevels - 1;

/// One tensor to sum over 12^depth shards.  All memory is aligned to its elements; better, no two
/// tensors start at the same address modulo 4096, as their lines compete for one place in the
/// cache.
struct SumSegment {
  DType dtype;
  /// numel elements.  May be the very memory of one shard; may not overlap one in part.
  void* out;
  /// 12^depth pointers to numel elements each; null is absent.
  const void* const* shards;
  std::size_t numel;
};

/// Sums the elements [begin, end) up all `depth` levels (0 to 3).  Leaves out as it is when no
/// shard is present.
void sum_range(const SumSegment& segment, int depth, std::size_t begin, std::size_t end);

/// The instruction sets that the loops are compiled for.  `baseline` is what the compiler was told
/// to assume of every machine; it is the only one away from x86-64.
enum class Isa : std::uint8_t { baseline, avx2, avx512 };

const char* isa_name(Isa isa);
std::vector<Isa> available_isas();
Isa best_isa();
Isa active_isa();
/// For tests: throws std::invalid_argument if this machine lacks the ISA.  The default is the best.
void set_isa(Isa isa);

}  // namespace torch_spheres
