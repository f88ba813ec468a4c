#include "decode.h"

#include "launchers.h"

namespace rasa_ext {

void decode(const Device& device, const Tensor& x, const Tensor& Ap, const Tensor& Bp,
            const Tensor& U, const Tensor& y) {
  const DType dtype = dtype_of(x);
  const Tensor tokens = dense(x, dtype), down = dense(Ap, dtype), up = dense(Bp, dtype);
  const int M = to_int("tokens", x.size(0)), in = to_int("in_features", x.size(1));
  const int out = to_int("out_features", Bp.size(1)), rank = to_int("rank", Ap.size(0));
  const Tensor workspace = empty_bytes(x, decode_workspace(M, in, rank));
  launch_decode({tokens.data_ptr(), down.data_ptr(), up.data_ptr(), U.data_ptr(), y.data_ptr(),
                 workspace.data_ptr(), M, in, out, rank},
                dtype, device.stream());
  device.check_launch("decode");
}

}  // namespace rasa_ext
