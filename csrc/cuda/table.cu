// Launcher of table.cuh.
#include "table.cuh"

#include <algorithm>
#include <cstring>

#include "launchers.h"

namespace rasa_ext {

void launch_write_table(const void* host, void* device, size_t words, Stream stream) {
  const char* from = static_cast<const char*>(host);
  uint64_t* to = static_cast<uint64_t*>(device);
  for (size_t done = 0; done < words; done += kTableWords) {
    const size_t count = std::min<size_t>(words - done, kTableWords);
    TableParams params{to + done, static_cast<int64_t>(count), {}};
    std::memcpy(params.words, from + done * sizeof(uint64_t), count * sizeof(uint64_t));
    RASA_LAUNCH((write_table_kernel), 1, kTableThreads, 0, stream, params);
  }
}

}  // namespace rasa_ext
