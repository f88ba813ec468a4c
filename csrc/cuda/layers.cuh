// The layers of a group as kernel parameters.
#pragma once

#include <algorithm>

#include "launchers.h"
#include "platform.cuh"

namespace rasa_ext {

template <typename Layer>
struct Layers {
  const Layer* table;  // null if the layers are in `here`
  Layer here[kLayersByValue];

  Layers(const Layer* host, const Layer* device, int count)
      : table(count > kLayersByValue ? device : nullptr) {
    if (table == nullptr) std::copy(host, host + count, here);
  }

  __device__ __forceinline__ Layer operator[](int i) const {
    return table != nullptr ? table[i] : here[i];
  }
};

}  // namespace rasa_ext
