// Runs every launcher and compares it with float64: `rasa_check [--small]
// [pack|pack_backward|...]`.
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>

#include "arrays.h"
#include "checks.h"

namespace {

bool small = false;
int cases = 0;
std::string case_now;

}  // namespace

namespace check {

bool is_small() { return small; }

void begin_case(const std::string& name) {
  ++cases;
  case_now = name;
}

void fail(const std::string& message) { throw std::runtime_error(message); }

}  // namespace check

int main(int count, char** arguments) {
  const std::map<std::string, void (*)()> checks{
#ifndef RASA_ON_GPU
      {"machine", check::check_machine},
#endif
      {"pack", check::check_pack},       {"pack_backward", check::check_pack_backward},
      {"decode", check::check_decode},   {"dropout", check::check_dropout},
      {"skinny", check::check_skinny},   {"table", check::check_table}};
  std::vector<std::string> wanted;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--small") == 0) {
      small = true;
    } else if (checks.count(arguments[i]) != 0) {
      wanted.push_back(arguments[i]);
    } else {
      std::fprintf(stderr, "rasa_check: no check is called %s\n", arguments[i]);
      return 2;
    }
  }
  if (wanted.empty()) {
    for (const auto& [name, body] : checks) wanted.push_back(name);
  }
  for (const std::string& name : wanted) {
    cases = 0;
    try {
      checks.at(name)();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "rasa_check: %s: %s: %s\n", name.c_str(), case_now.c_str(),
                   error.what());
      return 1;
    }
    std::printf("%s: %d cases hold\n", name.c_str(), cases);
  }
  return 0;
}
