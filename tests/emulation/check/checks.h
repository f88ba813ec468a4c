// The checks that the program runs; each throws where something does not hold.
#pragma once

namespace check {

void check_machine();  // of the emulation itself
void check_pack();
void check_pack_backward();
void check_decode();
void check_dropout();
void check_skinny();
void check_table();

}  // namespace check
