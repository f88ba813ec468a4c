// The checks of the program; each throws an exception if it fails.
#pragma once

namespace check {

void check_machine();  // checks the emulation itself
void check_pack();
void check_pack_backward();
void check_decode();
void check_dropout();
void check_skinny();
void check_table();

}  // namespace check
