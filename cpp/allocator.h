// Has the C library keep freed memory instead of giving it back to the system.
//
//     keep_freed_memory();   // once, before the tensors that are allocated and freed at every step
//
// A training step frees large tensors and allocates the same ones again in the next. glibc maps
// each of them afresh, and the system clears every page of it at the first touch; on a small CNN
// that is half of the time of a step (benchmarks/bench_training.py). Kept memory is reused
// uncleared, as torch's own allocator does on CUDA. The process stays as large as it ever was.
//
// With `lean`, blocks of a megabyte and more are given back after all. glibc seldom reuses an
// aligned block for another of the same size: it looks for room for the alignment as well, and
// small objects take what was left beside the block. With the gradients of 144 shards coming and
// going, the heap grew to three times what was ever in use (benchmarks/bench_memory.py).
//
// Any thread; it holds for the whole process and cannot be undone. With another allocator in
// place of glibc's (tcmalloc, jemalloc), which have settings of their own, it changes nothing.
#pragma once

#include <algorithm>
#include <cstdlib>  // says which C library it is
#include <thread>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace torch_spheres {

/// False where the C library has no such setting.
inline bool keep_freed_memory([[maybe_unused]] bool lean) {
#if defined(__GLIBC__)
  // No block has a mapping of its own, or only large ones; memory at the end of the heap is never
  // given back; heaps grow by a whole thread's heap at a time; and there are as many as cores. With
  // one for all, sixteen threads wait for each other: on two cores two heaps are up to twice as
  // fast, and no larger.  Lean there is only one: with one for each thread, each of 144 spheres
  // would keep what it once needed (9 GiB instead of 3 in benchmarks/bench_memory.py).
  constexpr int kThreadHeap = 64 << 20;
  constexpr int kLarge = 1 << 20;
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());  // 0: unknown
  const int heaps = lean ? 1 : std::max(1, cores);
  const bool mapped =
      lean ? mallopt(M_MMAP_MAX, 65536) == 1 && mallopt(M_MMAP_THRESHOLD, kLarge) == 1
           : mallopt(M_MMAP_MAX, 0) == 1;
  return mapped && mallopt(M_TRIM_THRESHOLD, -1) == 1 && mallopt(M_TOP_PAD, kThreadHeap) == 1 &&
         mallopt(M_ARENA_MAX, heaps) == 1;
#else
  return false;
#endif
}

}  // namespace torch_spheres
