// Counts every byte that a process allocates (LD_PRELOAD): the exact peak between two points, where
// the resident set that the kernel reports is rounded to a quarter of a megabyte.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

static atomic_long now, peak;

static void* add(void* p) {
  if (p != NULL) {
    const long total = atomic_fetch_add(&now, (long)malloc_usable_size(p)) + malloc_usable_size(p);
    long seen = atomic_load(&peak);
    while (total > seen && !atomic_compare_exchange_weak(&peak, &seen, total)) {
    }
  }
  return p;
}

void peak_reset(void) {
  atomic_store(&now, 0);
  atomic_store(&peak, 0);
}
long peak_bytes(void) { return atomic_load(&peak); }

// glibc's own entry points, so that no symbol has to be looked up while it is being replaced.
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

void* malloc(size_t n) { return add(__libc_malloc(n)); }
void* calloc(size_t n, size_t size) { return add(__libc_calloc(n, size)); }
void* memalign(size_t align, size_t n) { return add(__libc_memalign(align, n)); }
void* aligned_alloc(size_t align, size_t n) { return memalign(align, n); }
int posix_memalign(void** out, size_t align, size_t n) {
  *out = memalign(align, n);
  return *out == NULL ? 12 : 0;
}
void* realloc(void* p, size_t n) {
  if (p != NULL) atomic_fetch_sub(&now, (long)malloc_usable_size(p));
  return add(__libc_realloc(p, n));
}
void free(void* p) {
  if (p != NULL) atomic_fetch_sub(&now, (long)malloc_usable_size(p));
  __libc_free(p);
}
