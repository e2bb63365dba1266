/* Preloaded (LD_PRELOAD) into the benchmark's processes, hides AVX-512 and AMX: what CPUID says of them is cleared, so
 * that every engine runs the kernels that it has for processors with AVX2. Linux on x86-64, where processor and hypervisor
 * let CPUID fault: the fault's handler executes it and edits the answer. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { SET_CPUID = 0x1012, FAULTS = 0, WORKS = 1 }; /* of arch_prctl, asm/prctl.h; for this thread and its children */

static void hide(unsigned leaf, unsigned subleaf, unsigned r[4]) {
  const unsigned avx512_b = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
  const unsigned avx512_c = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
  const unsigned avx512_d = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 23, amx_d = 1u << 22 | 1u << 24 | 1u << 25;
  if (leaf == 7 && subleaf == 0) r[1] &= ~avx512_b, r[2] &= ~avx512_c, r[3] &= ~(avx512_d | amx_d);
  if (leaf == 7 && subleaf == 1) r[0] &= ~(1u << 5 | 1u << 21), r[3] &= ~(1u << 19); /* AVX512-BF16, AMX, AVX10 */
}

typedef int (*Sigaction)(int, const struct sigaction *, struct sigaction *);
typedef sighandler_t (*Signal)(int, sighandler_t);

static int real_sigaction(int number, const struct sigaction *action, struct sigaction *before) {
  return ((Sigaction)dlsym(RTLD_NEXT, "sigaction"))(number, action, before);
}

/* In place of the C library's: who handles this signal itself, as GCC does, must not take it from us. */
int sigaction(int number, const struct sigaction *action, struct sigaction *before) {
  if (number != SIGSEGV) return real_sigaction(number, action, before);
  if (before) memset(before, 0, sizeof *before);
  return 0;
}
sighandler_t signal(int number, sighandler_t handler) {
  return number == SIGSEGV ? SIG_DFL : ((Signal)dlsym(RTLD_NEXT, "signal"))(number, handler);
}

static void answer(int number, siginfo_t *info, void *context) {
  (void)info;
  greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *at = (const unsigned char *)g[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0xa2) { /* not CPUID: let it fault again, without us */
    const struct sigaction by_default = {.sa_handler = SIG_DFL};
    real_sigaction(number, &by_default, NULL);
    return;
  }
  const unsigned leaf = g[REG_RAX], subleaf = g[REG_RCX];
  unsigned r[4];
  syscall(SYS_arch_prctl, SET_CPUID, WORKS);
  __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
  syscall(SYS_arch_prctl, SET_CPUID, FAULTS);
  hide(leaf, subleaf, r);
  g[REG_RAX] = r[0], g[REG_RBX] = r[1], g[REG_RCX] = r[2], g[REG_RDX] = r[3];
  g[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (real_sigaction(SIGSEGV, &action, NULL) || syscall(SYS_arch_prctl, SET_CPUID, FAULTS)) {
    static const char why[] = "this processor, or its hypervisor, cannot hide instruction sets\n";
    if (write(2, why, sizeof why - 1)) _exit(1);
    _exit(1);
  }
}
