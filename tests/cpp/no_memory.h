// operator new for the one file of a program that includes this: it counts, and runs out of memory
// when a test says so.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace torch_spheres::testing {

inline std::atomic<std::size_t> memory_taken{0};
/// How often the calling thread may still ask for memory; negative: without end.
inline thread_local std::int64_t allocations_left = -1;

}  // namespace torch_spheres::testing

// All other forms of new and delete end up in these.
[[gnu::noinline]] void* operator new(std::size_t size) {
  using namespace torch_spheres::testing;
  void* memory = allocations_left == 0 ? nullptr : std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  memory_taken += size;
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
