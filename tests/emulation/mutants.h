// Breaks that lie in a program side by side, of which one is chosen as it starts: mutate.py writes
// them into the kernels. RASA_MUTANT is the number of the one that is on; without it none is.
#pragma once

#include <cstdlib>

namespace mutants {

inline const int chosen = std::getenv("RASA_MUTANT") ? std::atoi(std::getenv("RASA_MUTANT")) : -1;

#define RASA_INLINE __attribute__((always_inline)) inline  // a kernel's loops call it

RASA_INLINE bool on(int mutant) { return chosen == mutant; }

// A bound: `a < At{7, 1} > b`, that is (a < At{7, 1}) > b, is a < b. Where mutant 7 is on it is
// FIRST, and where 8 is, SECOND, which is further off by `step`.
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
