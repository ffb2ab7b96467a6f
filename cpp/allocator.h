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
#include <dlfcn.h>
#include <gnu/libc-version.h>
#include <malloc.h>
#include <unistd.h>

#include <fstream>
#include <string>
#endif

namespace torch_spheres {

/// Whether threads had better take their memory from the main heap, see fitting_thread.h.
inline std::atomic<bool> main_heap_is_better{false};

/// Whether malloc is the C library's own, and no other one that was loaded before it.
inline bool has_glibcs_malloc() {
#if defined(__GLIBC__)
  Dl_info used{}, own{};
  void* const in_use = dlsym(RTLD_DEFAULT, "malloc");
  return in_use != nullptr && dladdr(in_use, &used) != 0 &&
         dladdr(reinterpret_cast<void*>(&gnu_get_libc_version), &own) != 0 &&
         used.dli_fbase == own.dli_fbase;
#else
  return false;
#endif
}

#if defined(__GLIBC__)
/// Where the main heap begins, 0 if the system does not say.
inline std::uintptr_t begin_of_main_heap() {
  static const std::uintptr_t begin = [] {
    std::uintptr_t found = 0;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; found == 0 && std::getline(maps, line);) {
      if (line.find("[heap]") != std::string::npos) found = std::stoull(line, nullptr, 16);
    }
    return found;
  }();
  return begin;
}
#endif

/// Whether the calling thread takes its memory from the main heap, for good: its first block says.
inline bool on_main_heap() {
#if defined(__GLIBC__)
  // (volatile: the compiler may leave out a block that nobody uses.)
  void* volatile block = std::malloc(4096);
  // The main heap ends at the program break; glibc maps others elsewhere.
  const auto address = reinterpret_cast<std::uintptr_t>(block);
  const bool is_main =
      begin_of_main_heap() <= address && address < reinterpret_cast<std::uintptr_t>(sbrk(0));
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
  main_heap_is_better.store(kept && !lean && has_glibcs_malloc());
  return kept;
#else
  return false;
#endif
}

}  // namespace torch_spheres
