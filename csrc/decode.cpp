#include "decode.h"

#include "launchers.h"

namespace rasa_ext {

void decode(const Device& device, const Tensor& x, const Tensor& Ap, const std::vector<Tensor>& Bp,
            const Tensor& U, const std::vector<Tensor>& y) {
  const DType dtype = dtype_of(x);
  const Tensor tokens = dense(x, dtype), down = dense(Ap, dtype);
  const int M = to_int("tokens", x.size(0)), in = to_int("in_features", x.size(1));
  const int rank = to_int("rank", Ap.size(0));
  const Tensor workspace = empty_bytes(x, decode_workspace(M, in, rank));
  DecodeCall call{tokens.data_ptr(),
                  down.data_ptr(),
                  U.data_ptr(),
                  workspace.data_ptr(),
                  M,
                  in,
                  rank,
                  static_cast<int>(Bp.size()),
                  {}};
  std::vector<Tensor> ups;
  int first = 0;
  for (size_t i = 0; i < Bp.size(); ++i) {
    ups.push_back(dense(Bp[i], dtype));
    const int own = to_int("rank", ups[i].size(0));
    call.output[i] = {ups[i].data_ptr(), y[i].data_ptr(), to_int("out_features", ups[i].size(1)),
                      first, own};
    first += own;
  }
  launch_decode(call, dtype, device.stream());
  device.check_launch("decode");
}

}  // namespace rasa_ext
