// C functions as work items: what native_items.py compiles, and hands to distribute_work().
#include <stdatomic.h>
#include <stdint.h>

struct counts {
  _Atomic int64_t count;
  _Atomic int64_t sum;
};

void nothing(void* context, int64_t item) {
  (void)context;
  (void)item;
}

void tally(void* context, int64_t item) {
  struct counts* counts = context;
  atomic_fetch_add_explicit(&counts->count, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&counts->sum, item, memory_order_relaxed);
}
