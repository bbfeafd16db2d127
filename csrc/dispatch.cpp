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
constexpr unsigned kAvxFmaF16c = 1U << 28 | 1U << 12 | 1U << 29;                // leaf 1, ecx
constexpr unsigned kAvx2 = 1U << 5;                                             // leaf 7, ebx
constexpr unsigned kAvx512FDqBwVl = 1U << 16 | 1U << 17 | 1U << 30 | 1U << 31;  // leaf 7, ebx
bool runs_avx2() { return has(kAvxFmaF16c, kAvx2, 0x6); }
bool runs_avx512() { return has(kAvxFmaF16c, kAvx2 | kAvx512FDqBwVl, 0xE6); }
#endif

struct Candidate {
    const Kernels* kernels;  // null where this build has none
    const char* name;
    bool (*runs)();
};

bool always() { return true; }

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kernels_avx512, "avx512", runs_avx512},
    {&kernels_avx2, "avx2", runs_avx2},
#else
    {nullptr, "avx512", nullptr},
    {nullptr, "avx2", nullptr},
#endif
#if defined(__aarch64__)
    {&kernels_neon, "neon", always},
#else
    {nullptr, "neon", nullptr},
#endif
    {&kernels_scalar, "scalar", always},
};

const Kernels& choose() {
    const char* wanted = std::getenv("MLXGPT_ISA");
    std::string here;
    for (const Candidate& candidate : kCandidates) {
        if (candidate.kernels == nullptr || !candidate.runs()) continue;
        if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == candidate.name)
            return *candidate.kernels;
        here += (here.empty() ? "" : ", ") + std::string(candidate.name);
    }
    for (const Candidate& candidate : kCandidates)
        if (std::string(wanted) == candidate.name)
            throw std::invalid_argument("MLXGPT_ISA is '" + std::string(wanted) +
                                        "', which this processor does not run; it runs " + here);
    throw std::invalid_argument("MLXGPT_ISA is '" + std::string(wanted) +
                                "', expected one of scalar, avx2, avx512, neon; this processor runs " + here);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace mlxgpt
