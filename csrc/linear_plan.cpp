#include "linear_plan.h"

namespace rasa_ext {

std::vector<GemmCall> plan_forward(const LinearForward& forward) {
  std::vector<GemmCall> calls;
  calls.push_back(multiply(forward.kept, forward.Ap.t(), forward.U, 0));
  calls.back().alpha = forward.scale;
  calls.push_back(multiply(forward.U, forward.Bp, forward.y, forward.y_is_set ? 1 : 0));
  if (forward.weight.data != nullptr) {
    calls.push_back(multiply(forward.x, forward.weight.t(), forward.y, 1));
  }
  return calls;
}

std::vector<GemmCall> plan_backward(const LinearBackward& backward) {
  std::vector<GemmCall> calls;
  if (backward.H.data != nullptr) {
    calls.push_back(multiply(backward.grad, backward.Bp.t(), backward.H, 0));
    calls.back().alpha = backward.scale;
  }
  if (backward.dBp.data != nullptr) {
    calls.push_back(multiply(backward.U.t(), backward.grad, backward.dBp, 0));
  }
  if (backward.dAp.data != nullptr) {
    calls.push_back(multiply(backward.H.t(), backward.kept, backward.dAp, 0));
  }
  if (backward.dx.data != nullptr) {
    calls.push_back(multiply(backward.H, backward.Ap, backward.dx, 0));
  }
  return calls;
}

}  // namespace rasa_ext
