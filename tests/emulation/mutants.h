// Lets one program contain many mutants, which mutate.py writes into the kernels. The environment
// variable RASA_MUTANT is the number of the active mutant; without it, none is active.
#pragma once

#include <cstdlib>

namespace mutants {

inline const int chosen = std::getenv("RASA_MUTANT") ? std::atoi(std::getenv("RASA_MUTANT")) : -1;

#define RASA_INLINE __attribute__((always_inline)) inline  // a kernel's loops call it

RASA_INLINE bool on(int mutant) { return chosen == mutant; }

// A bound: `a < At{7, 1} > b`, parsed as (a < At{7, 1}) > b, means a < b. If mutant 7 is active, it
// means FIRST; if mutant 8 is active, SECOND, which shifts the bound by `step`.
struct At {
  int mutant, step;
};

#define RASA_BOUND(NAME, OPERATOR, FIRST, SECOND)     \
  template <typename A>                               \
  struct NAME {                                       \
    A a;                                              \
    int mutant, step;                                 \
  };                                                  \
  template <typename A>                               \
  RASA_INLINE NAME<A> operator OPERATOR(A a, At at) { \
    return {a, at.mutant, at.step};                   \
  }                                                   \
  template <typename A, typename B>                   \
  RASA_INLINE bool operator>(NAME<A> left, B b) {     \
    const int step = left.step;                       \
    static_cast<void>(step);                          \
    if (on(left.mutant)) return left.a FIRST b;       \
    if (on(left.mutant + 1)) return left.a SECOND b;  \
    return left.a OPERATOR b;                         \
  }

RASA_BOUND(Less, <, <=, +step <)
RASA_BOUND(LessEqual, <=, <, <= step +)
RASA_BOUND(Greater, >, >=, > step +)
RASA_BOUND(GreaterEqual, >=, >, +step >=)
#undef RASA_BOUND
#undef RASA_INLINE

}  // namespace mutants
