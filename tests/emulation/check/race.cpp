// Two threads write to one place, within a block or, with an argument, across blocks.
// ThreadSanitizer must report the race.
#include "emulation.h"

int main(int count, char**) {
  const bool across = count > 1;
  int global = 0;
  emulation::launch(dim3(2), dim3(32), sizeof(int), [&] {
    int* place = across ? &global : static_cast<int*>(emulation::shared_memory());
    if (across ? threadIdx.x == 0 : threadIdx.x < 2) *place = static_cast<int>(threadIdx.x);
  });
  return 0;
}
