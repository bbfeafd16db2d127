#include "runtime/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace mlxgpt {
namespace {

// ---- whether this processor runs each instruction set ----

bool runs_scalar() { return true; }

#if defined(__x86_64__)
// The processor must have the instructions, and the operating system must save the registers that they use:
// xgetbv reads XCR0, which has bits 1 and 2 for the ymm registers, 5, 6 and 7 for the mask and zmm registers.
bool has(unsigned leaf1_ecx, unsigned leaf7_ebx, unsigned leaf7_ecx, unsigned saved_state) {
    constexpr unsigned kOsxsave = 1U << 27;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave) || (c & leaf1_ecx) != leaf1_ecx) return false;
    unsigned xcr0, high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if ((xcr0 & saved_state) != saved_state) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & leaf7_ebx) == leaf7_ebx &&
           (c & leaf7_ecx) == leaf7_ecx;
}
constexpr unsigned kAvxFmaF16c = 1U << 28 | 1U << 12 | 1U << 29;  // leaf 1, ecx
constexpr unsigned kAvx2 = 1U << 5;                               // leaf 7, ebx
bool runs_avx2() { return has(kAvxFmaF16c, kAvx2, 0, 0x6); }
#if defined(MLXGPT_EMULATE_AVX512)
bool runs_avx512() { return runs_avx2(); }
bool runs_avx512vnni() { return runs_avx2(); }
#else
constexpr unsigned kAvx512FDqBwVl = 1U << 16 | 1U << 17 | 1U << 30 | 1U << 31;  // leaf 7, ebx
constexpr unsigned kVnni = 1U << 11;                                            // leaf 7, ecx
bool runs_avx512() { return has(kAvxFmaF16c, kAvx2 | kAvx512FDqBwVl, 0, 0xE6); }
bool runs_avx512vnni() { return has(kAvxFmaF16c, kAvx2 | kAvx512FDqBwVl, kVnni, 0xE6); }
#endif
#elif defined(__aarch64__)
bool runs_neon() { return true; }
#if defined(__linux__)
bool runs_neondot() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#else
bool runs_neondot() { return true; }  // every 64-bit processor of a Mac
#endif
#endif

// ---- the choice ----

const Kernels& choose() {
    const char* variable = std::getenv("MLXGPT_ISA");
    const std::string wanted = variable == nullptr ? "" : variable;
    std::string here;
    for (const Kernels* candidate : usable_kernels()) {
        if (wanted.empty() || wanted == candidate->name) return *candidate;
        here += (here.empty() ? "" : ", ") + std::string(candidate->name);
    }
#define MLXGPT_NAME(name, architecture) #name,
    constexpr const char* kNames[] = {MLXGPT_TARGETS(MLXGPT_NAME)};
#undef MLXGPT_NAME
    std::string names;
    for (const char* name : kNames) {
        if (wanted == name)
            throw std::invalid_argument("MLXGPT_ISA is '" + wanted +
                                        "', which this processor does not run; it runs " + here);
        names += (names.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument("MLXGPT_ISA is '" + wanted + "', expected one of " + names +
                                "; this processor runs " + here);
}

}  // namespace

// MLXGPT_ON_<architecture>(code) is the code if this is built for the architecture, else nothing.
#define MLXGPT_ON_ANY(code) code
#if defined(__x86_64__)
#define MLXGPT_ON_X86_64(code) code
#else
#define MLXGPT_ON_X86_64(code)
#endif
#if defined(__aarch64__)
#define MLXGPT_ON_AARCH64(code) code
#else
#define MLXGPT_ON_AARCH64(code)
#endif

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable;
#define MLXGPT_ADD(name, architecture) \
    MLXGPT_ON_##architecture(if (runs_##name()) usable.push_back(&kernels_##name);)
    MLXGPT_TARGETS(MLXGPT_ADD)
#undef MLXGPT_ADD
    std::reverse(usable.begin(), usable.end());
    return usable;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace mlxgpt
