#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mlxgpt {
namespace {

#if defined(__x86_64__)
// A processor that has AVX2 is of no use before the operating system saves its registers: XCR0 tells,
// which xgetbv reads. Bits: 1, 2 the ymm registers; 5, 6, 7 the mask and zmm registers.
bool has(unsigned leaf1_ecx, unsigned leaf7_ebx, unsigned saved_state) {
    constexpr unsigned kOsxsave = 1U << 27;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave) || (c & leaf1_ecx) != leaf1_ecx) return false;
    unsigned xcr0, high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if ((xcr0 & saved_state) != saved_state) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & leaf7_ebx) == leaf7_ebx;
}
constexpr unsigned kAvxFmaF16c = 1U << 28 | 1U << 12 | 1U << 29;  // leaf 1, ecx
constexpr unsigned kAvx2 = 1U << 5;                               // leaf 7, ebx
bool runs_avx2() { return has(kAvxFmaF16c, kAvx2, 0x6); }
#if defined(MLXGPT_EMULATE_AVX512)
bool runs_avx512() { return runs_avx2(); }
#else
constexpr unsigned kAvx512FDqBwVl = 1U << 16 | 1U << 17 | 1U << 30 | 1U << 31;  // leaf 7, ebx
bool runs_avx512() { return has(kAvxFmaF16c, kAvx2 | kAvx512FDqBwVl, 0xE6); }
#endif
#endif

const Kernels& choose() {
    const char* variable = std::getenv("MLXGPT_ISA");
    const std::string wanted = variable == nullptr ? "" : variable;
    std::string here;
    for (const Kernels* candidate : usable_kernels()) {
        if (wanted.empty() || wanted == candidate->name) return *candidate;
        here += (here.empty() ? "" : ", ") + std::string(candidate->name);
    }
    for (const char* name : {"scalar", "avx2", "avx512", "neon"})
        if (wanted == name)
            throw std::invalid_argument("MLXGPT_ISA is '" + wanted +
                                        "', which this processor does not run; it runs " + here);
    throw std::invalid_argument("MLXGPT_ISA is '" + wanted +
                                "', expected one of scalar, avx2, avx512, neon; this processor runs " + here);
}

}  // namespace

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable;
#if defined(__x86_64__)
    if (runs_avx512()) usable.push_back(&kernels_avx512);
    if (runs_avx2()) usable.push_back(&kernels_avx2);
#elif defined(__aarch64__)
    usable.push_back(&kernels_neon);
#endif
    usable.push_back(&kernels_scalar);
    return usable;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace mlxgpt
