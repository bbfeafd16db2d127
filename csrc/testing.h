// What the test programs share.
#pragma once

#include <cstdio>

namespace mlxgpt {

inline int faults = 0;

/// Prints a line for a fault, and counts it.
template <class... Values>
void expect(bool good, const char* format, Values... values) {
    if (good) return;
    if (++faults > 20) return;
    std::printf("FAULT: ");
    std::printf(format, values...);  // NOLINT
    std::printf("\n");
}

/// A test program's exit status.
inline int verdict() {
    std::printf(faults == 0 ? "passed\n" : "%d faults\n", faults);
    return faults == 0 ? 0 : 1;
}

}  // namespace mlxgpt
