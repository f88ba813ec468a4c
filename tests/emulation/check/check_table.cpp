#include <algorithm>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {

// All words are written, and memory beside them is not. The host may change its words after the
// call.
void check_table() {
  constexpr size_t kMargin = 4;
  for (const size_t words : {size_t{0}, size_t{1}, size_t{128}, size_t{129}, size_t{510},
                             size_t{511}, size_t{1020}, size_t{1300}}) {
    begin_case(std::to_string(words) + " words");
    const size_t all = words + 2 * kMargin, bytes = all * sizeof(uint64_t);
    auto* device = static_cast<uint64_t*>(allocate(bytes));
    std::vector<uint64_t> host(words);
    for (size_t i = 0; i < words; ++i) host[i] = (i + 1) * 0x9E3779B97F4A7C15;
    const std::vector<uint64_t> expected = host;
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      set_schedule(seed);
      std::memset(device, 0xa5, bytes);
      finish();
      host = expected;
      rasa_ext::launch_write_table(host.data(), device + kMargin, words, nullptr);
      std::fill(host.begin(), host.end(), 0);
      finish();
      for (size_t i = 0; i < all; ++i) {
        const bool inside = i >= kMargin && i < kMargin + words;
        if (device[i] != (inside ? expected[i - kMargin] : 0xa5a5a5a5a5a5a5a5)) {
          fail("word " + std::to_string(i));
        }
      }
    }
    release(device);
  }
}

}  // namespace check
