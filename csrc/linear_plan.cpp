#include "linear_plan.h"

namespace rasa_ext {

std::vector<GemmCall> plan_forward(const LinearForward& forward) {
  std::vector<GemmCall> calls;
  calls.push_back(multiply(forward.x_dropped, forward.Ap.t(), forward.U, false));
  calls.back().alpha = forward.scale;
  calls.push_back(multiply_add(forward.U, forward.Bp, forward.C, forward.y));
  if (forward.weight.data != nullptr) {
    calls.push_back(multiply(forward.x, forward.weight.t(), forward.y, true));
  }
  return calls;
}

std::vector<GemmCall> plan_backward(const LinearBackward& backward) {
  std::vector<GemmCall> calls;
  if (backward.H.data != nullptr) {
    calls.push_back(multiply(backward.grad, backward.Bp.t(), backward.H, false));
    calls.back().alpha = backward.scale;
  }
  if (backward.dBp.data != nullptr) {
    calls.push_back(multiply(backward.U.t(), backward.grad, backward.dBp, false));
  }
  if (backward.dAp.data != nullptr) {
    calls.push_back(multiply(backward.H.t(), backward.x_dropped, backward.dAp, false));
  }
  if (backward.dx.data != nullptr) {
    calls.push_back(multiply(backward.H, backward.Ap, backward.dx, false));
  }
  return calls;
}

}  // namespace rasa_ext
