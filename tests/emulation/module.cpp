// Python bindings of the emulated launchers. Pointers are integers: Tensor.data_ptr().
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation.h"
#include "launchers.h"

namespace py = pybind11;
using namespace rasa_ext;

namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// The device's copy of the table, in separate memory; empty if the layers are passed by value.
template <typename Layer>
std::vector<Layer> on_device(const std::vector<Layer>& host) {
  return host.size() > kLayersByValue ? host : std::vector<Layer>{};
}

void bind_table(py::module_& module) {
  module.def("write_table", [](const std::vector<uint64_t>& words, Address to) {
    launch_write_table(words.data(), pointer(to), words.size(), nullptr);
  });
}

void bind_pack(py::module_& module) {
  py::class_<PackLayer>(module, "PackLayer").def(py::init([](Address A, Address B, Address d) {
    return PackLayer{pointer(A), pointer(B), pointer(d)};
  }));
  module.attr("layers_by_value") = kLayersByValue;
  module.def("pack", [](const std::vector<PackLayer>& layers, Address A_pool, Address B_pool,
                        Address Ap, Address Bp, int in, int out, int own, int pooled, int Rp,
                        DType param, DType dtype) {
    const PackGroup group{pointer(A_pool),
                          pointer(B_pool),
                          pointer(Ap),
                          pointer(Bp),
                          static_cast<int>(layers.size()),
                          in,
                          out,
                          own,
                          pooled,
                          Rp};
    launch_pack(group, layers.data(), on_device(layers).data(), param, dtype, nullptr);
  });
}

void bind_pack_backward(py::module_& module) {
  py::class_<PackBackwardLayer>(module, "PackBackwardLayer")
      .def(py::init([](Address dAp, Address dBp, Address B, Address d) {
        return PackBackwardLayer{pointer(dAp), pointer(dBp), pointer(B), pointer(d)};
      }));
  module.def("pack_backward", [](const std::vector<PackBackwardLayer>& layers, Address B_pool,
                                 Address dA, Address dA_pool, Address dB, Address dB_pool,
                                 Address dd, int in, int out, int own, int pooled, DType param) {
    const PackBackwardGroup group{pointer(B_pool),
                                  pointer(dA),
                                  pointer(dA_pool),
                                  pointer(dB),
                                  pointer(dB_pool),
                                  pointer(dd),
                                  static_cast<int>(layers.size()),
                                  in,
                                  out,
                                  own,
                                  pooled};
    launch_pack_backward(group, layers.data(), on_device(layers).data(), param, nullptr);
  });
}

void bind_decode(py::module_& module) {
  module.def("decode_workspace", &decode_workspace);
  module.def("decode", [](Address x, Address Ap, Address Bp, Address U, Address y,
                          Address workspace, int M, int in, int out, int Rp, DType dtype) {
    launch_decode({pointer(x), pointer(Ap), pointer(Bp), pointer(U), pointer(y), pointer(workspace),
                   M, in, out, Rp},
                  dtype, nullptr);
  });
}

// A call without real memory, for results that depend only on sizes.
SkinnyCall sizes_of(int M, int N, int Rp, bool down, bool grad) {
  static char memory[16];
  SkinnyCall call{};
  call.P = down ? memory : nullptr;
  call.Q = grad ? memory : nullptr;
  call.M = M, call.N = N, call.Rp = Rp;
  return call;
}

void bind_skinny(py::module_& module) {
  module.def("skinny_workspace", [](int M, int N, int Rp, bool down, bool grad) {
    return skinny_workspace(sizes_of(M, N, Rp, down, grad));
  });
  module.def("skinny", [](Address S, Address P, Address D, Address Q, Address C, Address workspace,
                          int M, int N, int Rp, DType dtype) {
    launch_skinny({pointer(S), N, nullptr, pointer(P), N, pointer(D), Rp, 1, pointer(Q), Rp,
                   pointer(C), pointer(workspace), M, N, Rp},
                  dtype, nullptr);
  });
}

// Conversions from and to bits of float16 and bfloat16, to test the emulation's types.
void bind_half_types(py::module_& module) {
  module.def("to_float16", [](float value) { return emulation::as_float16(value).bits; });
  module.def("to_bfloat16", [](float value) { return emulation::as_bfloat16(value).bits; });
  module.def("from_float16",
             [](uint16_t bits) { return emulation::as_float(emulation::float16{bits}); });
  module.def("from_bfloat16",
             [](uint16_t bits) { return emulation::as_float(emulation::bfloat16{bits}); });
}

}  // namespace

PYBIND11_MODULE(rasa_emulated, module) {
  py::enum_<DType>(module, "DType")
      .value("float32", DType::kFloat32)
      .value("float64", DType::kFloat64)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  module.def("launches", [] { return emulation::counts().launches; });
  bind_table(module);
  bind_pack(module);
  bind_pack_backward(module);
  bind_decode(module);
  bind_skinny(module);
  bind_half_types(module);
}
