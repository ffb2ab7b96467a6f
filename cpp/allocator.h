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

#include <atomic>
#include <cstdint>
#include <cstdlib>  // says which C library it is

#if defined(__GLIBC__)
#include <malloc.h>
#include <unistd.h>
#endif

namespace torch_spheres {

/// Whether threads had better take their memory from the main heap, see fitting_thread.h.
inline std::atomic<bool> main_heap_is_better{false};

/// Whether the calling thread takes its memory from the main heap, for good: its first block says.
inline bool on_main_heap() {
#if defined(__GLIBC__)
  // (volatile: the compiler may leave out a block that nobody uses.)
  void* volatile block = std::malloc(4096);
  // The main heap ends at the program break; glibc maps others, which lie above it.
  const bool is_main =
      reinterpret_cast<std::uintptr_t>(block) < reinterpret_cast<std::uintptr_t>(sbrk(0));
  std::free(block);
  return is_main;
#else
  return true;
#endif
}

/// False where the C library has no such setting.
inline bool keep_freed_memory([[maybe_unused]] bool lean) {
#if defined(__GLIBC__)
  // No block has a mapping of its own, or only large ones; memory at the end of the heap is never
  // given back; and there is one heap, which grows by 64 MiB at a time.  A thread's own heap has no
  // room for a block of more than that: it would be mapped and given back after all, with every
  // call (a CNN whose shards have such activations took 1.7 times as long), and each of 144 spheres
  // would keep what it once needed.  That threads wait for each other costs steps of many tiny
  // tensors up to a tenth.  Heaps that other threads have made before stay, and new threads take
  // turns with them.
  constexpr int kLarge = 1 << 20;
  const bool mapped =
      lean ? mallopt(M_MMAP_MAX, 65536) == 1 && mallopt(M_MMAP_THRESHOLD, kLarge) == 1
           : mallopt(M_MMAP_MAX, 0) == 1;
  const bool kept = mapped && mallopt(M_TRIM_THRESHOLD, -1) == 1 &&
                    mallopt(M_TOP_PAD, 64 << 20) == 1 && mallopt(M_ARENA_MAX, 1) == 1;
  main_heap_is_better.store(kept && !lean);
  return kept;
#else
  return false;
#endif
}

}  // namespace torch_spheres
