// The arrays' memory if kernels are emulated.
#include <cstdlib>
#include <new>

#include "arrays.h"
#include "emulation.h"

namespace check {

void* allocate(size_t bytes) {
  void* memory = nullptr;  // exact size, so that AddressSanitizer sees the first byte beyond
  if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
  return memory;
}

void release(void* memory) { std::free(memory); }
void finish() {}
void set_schedule(uint64_t seed) { emulation::set_schedule(seed); }

}  // namespace check
