// Has the C library keep freed memory instead of giving it back to the system.
//
//     keep_freed_memory();   // once, before the tensors that are allocated and freed at every step
//
// A training step frees large tensors and allocates the same ones again in the next. glibc maps
// each of them afresh, and the system clears every page of it at the first touch; on a small CNN
// that is half of the time of a step (benchmarks/bench_training.py). Kept memory is reused
// uncleared, as torch's own allocator does on CUDA. The process stays as large as it ever was.
//
// Any thread; it holds for the whole process and cannot be undone. With another allocator in
// place of glibc's (tcmalloc, jemalloc), which have settings of their own, it changes nothing.
#pragma once

#include <cstdlib>  // says which C library it is

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace torch_spheres {

/// False where the C library has no such setting.
inline bool keep_freed_memory() {
#if defined(__GLIBC__)
  // No allocation has a mapping of its own; memory at the end of the heap is never given back;
  // heaps grow by a whole thread's heap at a time; and all threads share one, or each of 144
  // spheres would keep what it once needed (9 GiB instead of 3 in benchmarks/bench_memory.py).
  constexpr int kThreadHeap = 64 << 20;
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1 &&
         mallopt(M_TOP_PAD, kThreadHeap) == 1 && mallopt(M_ARENA_MAX, 1) == 1;
#else
  return false;
#endif
}

}  // namespace torch_spheres
