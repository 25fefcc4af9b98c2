// syscall(2) of the C library, except that the request for AMX, which Linux would refuse on the emulated machine, succeeds.
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>

#ifdef __cplusplus
extern "C"
#endif
long syscall(long number, ...) {
  long arguments[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; i++) arguments[i] = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && arguments[0] == 0x1023) return 0;  // ARCH_REQ_XCOMP_PERM
  register long fourth asm("r10") = arguments[3], fifth asm("r8") = arguments[4], sixth asm("r9") = arguments[5];
  long result;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(arguments[0]), "S"(arguments[1]), "d"(arguments[2]), "r"(fourth), "r"(fifth), "r"(sixth)
               : "rcx", "r11", "memory");
  if (result > -4096 && result < 0) {
    errno = (int)-result;
    return -1;
  }
  return result;
}
