// A kernel module that turns AMX on: it sets the tile registers' bits, 17 and 18, in the control register XCR0.
#include <linux/module.h>

static int __init amx_state(void) {
  u32 low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  asm volatile("xsetbv" : : "a"(low | 3u << 17), "d"(high), "c"(0));
  return 0;
}

module_init(amx_state);
MODULE_LICENSE("GPL");
