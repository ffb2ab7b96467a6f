#include "gradient_sum.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__FAST_MATH__)
#error "gradient_sum.cpp promises the same bits everywhere: compile it without -ffast-math"
#endif

namespace torch_spheres {
namespace {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

/// What a kernel does with the sum.
enum class Store {
  plain,
  stream,  // past the cache, for an output that nobody will read soon
};

/// One node's sum over n consecutive elements.
struct Node {
  const void* children[kKissing];  // where the elements start; null is absent
  void* out;
  std::size_t n;
};

using Kernel = void (*)(const Node&);

/// The loops for one ISA, by DType.  "Sums" are what inner nodes pass up: float or double.
struct Kernels {
  Kernel leaves_to_out[4];
  Kernel leaves_streamed_out[4];
  Kernel leaves_to_sums[4];
  Kernel sums_to_out[4];
  Kernel sums_to_sums[4];
};

/// What an absent child reads.  x + -0.0 is x for every x, -0.0 included (+0.0 would turn -0.0 into
/// +0.0), so a kernel adds twelve streams always; the absent ones stand still, in the L1 cache.
inline constexpr std::size_t kAbsentElements = 512;

template <class T>
constexpr T minus_zero() {
  if constexpr (sizeof(T) == 2) {
    return T{0x8000};
  } else {
    return -T{};
  }
}

template <class T>
struct AbsentBlock {
  alignas(64) static constexpr auto storage = [] {
    std::array<T, kAbsentElements> block{};
    block.fill(minus_zero<T>());
    return block;
  }();
  static constexpr const T* data = storage.data();
};

namespace baseline {
#define SUM_TARGET
#define SUM_BYTES 16
#include "gradient_kernels.h"
#undef SUM_TARGET
#undef SUM_BYTES
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2 {
#define SUM_TARGET __attribute__((target("avx2,f16c")))
#define SUM_BYTES 32
#include "gradient_kernels.h"
#undef SUM_TARGET
#undef SUM_BYTES
}  // namespace avx2

namespace avx512 {
#define SUM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")))
#define SUM_BYTES 64
#include "gradient_kernels.h"
#undef SUM_TARGET
#undef SUM_BYTES
}  // namespace avx512

bool has_f16c() {  // not among the names that every compiler's __builtin_cpu_supports knows
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

bool available(Isa isa) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && has_f16c();
  if (isa == Isa::avx2) return has_avx2;
  if (isa == Isa::avx512) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::baseline;
}

/// Relaxed: it selects among constants, and every choice gives the same bits.
std::atomic<int> g_isa{-1};  // -1: not chosen yet

const Kernels& kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::kKernels;
    case Isa::avx512:
      return avx512::kKernels;
#endif
    default:
      return baseline::kKernels;
  }
}

/// Bytes of one child's sums that an inner node holds at a time: 48 KiB of stack for all levels
/// together.  A run shorter than a page costs bandwidth, as the CPU's prefetcher starts afresh with
/// every run; that these blocks then live in the L2 cache costs less.
constexpr std::size_t block_bytes(int depth) { return depth <= 2 ? 4096 : 2048; }

/// The elements of a segment that are being summed.
struct Part {
  const SumSegment& segment;
  const Kernels& kernels;
  std::size_t begin;
  std::size_t n;
};

/// The shards below one node: first + i * stride, for i below 12^depth.
struct Subtree {
  std::size_t first;
  std::size_t stride;
  int depth;

  Subtree child(std::size_t c) const { return {first + stride * c, stride * kKissing, depth - 1}; }
};

template <std::size_t kBlockBytes>
bool sum_inner(const Part& part, const Subtree& subtree, Kernel kernel, Node& node);

/// Finds the children of a node of leaves.  Whether there are any.
bool find_leaves(const Part& part, const Subtree& subtree, Node& node) {
  const std::size_t offset = part.begin * element_size(part.segment.dtype);
  bool any = false;
  for (std::size_t c = 0; c < kKissing; ++c) {
    const void* shard = part.segment.shards[subtree.child(c).first];
    node.children[c] = shard ? static_cast<const char*>(shard) + offset : nullptr;
    any |= shard != nullptr;
  }
  return any;
}

/// Sums a node below the root.  False, and nothing written, if it is absent.
template <std::size_t kBlockBytes>
bool sum_to_sums(const Part& part, const Subtree& subtree, Node& node) {
  const auto dtype = static_cast<std::size_t>(part.segment.dtype);
  if (subtree.depth > 1) {
    return sum_inner<kBlockBytes>(part, subtree, part.kernels.sums_to_sums[dtype], node);
  }
  const bool any = find_leaves(part, subtree, node);
  if (any) part.kernels.leaves_to_sums[dtype](node);
  return any;
}

/// Sums a node of inner nodes: its children into blocks on the stack, then those with `kernel`.
template <std::size_t kBlockBytes>
bool sum_inner(const Part& part, const Subtree& subtree, Kernel kernel, Node& node) {
  alignas(64) unsigned char sums[kKissing][kBlockBytes];
  bool any = false;
  for (std::size_t c = 0; c < kKissing; ++c) {
    Node child{.children = {}, .out = sums[c], .n = part.n};
    const bool present = sum_to_sums<kBlockBytes>(part, subtree.child(c), child);
    node.children[c] = present ? sums[c] : nullptr;
    any |= present;
  }
  if (any) kernel(node);
  return any;
}

/// Sums a range block by block, up all of more than one level.
template <int kDepth>
void sum_blocks(const SumSegment& segment, std::size_t begin, std::size_t end) {
  constexpr std::size_t kBlockBytes = block_bytes(kDepth);
  const std::size_t sum_size = segment.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  Part part{segment, kernels(), begin, 0};
  for (; part.begin < end; part.begin += part.n) {
    part.n = std::min(end - part.begin, kBlockBytes / sum_size);
    auto* out = static_cast<char*>(segment.out) + part.begin * element_size(segment.dtype);
    Node node{{}, out, part.n};
    const Kernel kernel = part.kernels.sums_to_out[static_cast<std::size_t>(segment.dtype)];
    sum_inner<kBlockBytes>(part, {0, 1, kDepth}, kernel, node);
  }
}

/// From this size on, an output of many megabytes that is written past the cache costs less memory
/// traffic; a smaller one is better left in the cache for whoever reads it next.
inline constexpr std::size_t kStreamBytes = std::size_t{4} << 20;

/// Of twelve leaves.  Deeper trees read so much for each element written that it makes no
/// difference.
bool is_streamed(const SumSegment& segment) {
  if (segment.numel * element_size(segment.dtype) < kStreamBytes) return false;
  for (std::size_t k = 0; k < kKissing; ++k) {
    if (segment.shards[k] == segment.out) return false;  // in the cache already
  }
  return true;
}

/// The only present shard, or null when there are more or none; `any` tells those apart.
const void* only_shard(const SumSegment& segment, int depth, bool& any) {
  const void* found = nullptr;
  for (std::size_t k = 0; k < static_cast<std::size_t>(Topology::count(depth)); ++k) {
    if (segment.shards[k] == nullptr) continue;
    any = true;
    if (found != nullptr) return nullptr;
    found = segment.shards[k];
  }
  return found;
}

}  // namespace

std::size_t element_size(DType dtype) {
  constexpr std::size_t sizes[] = {4, 8, 2, 2};
  return sizes[static_cast<std::size_t>(dtype)];
}

void sum_range(const SumSegment& segment, int depth, std::size_t begin, std::size_t end) {
  assert(depth >= 0 && depth <= kMaxSumDepth && begin <= end && end <= segment.numel);
  assert(reinterpret_cast<std::uintptr_t>(segment.out) % element_size(segment.dtype) == 0);
  bool any = false;
  const void* only = only_shard(segment, depth, any);
  if (!any || begin == end) return;

  const std::size_t element = element_size(segment.dtype);
  auto* out = static_cast<char*>(segment.out) + begin * element;
  if (only != nullptr) {
    const char* from = static_cast<const char*>(only) + begin * element;
    if (from != out) std::memcpy(out, from, (end - begin) * element);
    return;
  }

  if (depth == 2) return sum_blocks<2>(segment, begin, end);
  if (depth == 3) return sum_blocks<3>(segment, begin, end);
  const Part part{segment, kernels(), begin, end - begin};
  Node node{{}, out, part.n};
  find_leaves(part, {0, 1, 1}, node);
  const bool streamed = is_streamed(segment);
  const auto& to_out = streamed ? part.kernels.leaves_streamed_out : part.kernels.leaves_to_out;
  to_out[static_cast<std::size_t>(segment.dtype)](node);
#if defined(__x86_64__)
  // Streamed stores are weakly ordered; whoever is told that the sum is ready must see them.
  if (streamed) _mm_sfence();
#endif
}

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<std::size_t>(isa)];
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas = {Isa::baseline, Isa::avx2, Isa::avx512};
  std::erase_if(isas, [](Isa isa) { return !available(isa); });
  return isas;
}

Isa best_isa() { return available_isas().back(); }

Isa active_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(best_isa());
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(Isa isa) {
  if (!available(isa)) {
    std::string names;
    for (const Isa one : available_isas()) {
      names += (names.empty() ? "" : ", ") + std::string(isa_name(one));
    }
    throw std::invalid_argument(std::string("this machine has no ") + isa_name(isa) + "; it has " +
                                names);
  }
  g_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace torch_spheres
