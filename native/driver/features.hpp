// The instructions that this machine and its operating system run.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

namespace batchnorm {

// Asks the processor: compilers' own questions differ (clang knows no "f16c"), and cross-compilers
// lack the table behind them.
class Features {
  public:
    Features() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (__get_cpuid(1, &a, &b, &c, &d) == 0) return;
        const bool saves = bit(c, 27);  // the system saves more registers than those of SSE
        const unsigned saved = saves ? saved_registers() : 0;
        const bool wide = saves && (saved & 0x06) == 0x06 && bit(c, 28);
        const bool converts = bit(c, 29), fuses = bit(c, 12);
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return;
        avx2 = wide && converts && fuses && bit(b, 5);
        avx512 =
            avx2 && saves_avx512(saved) && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
    }

    bool avx2 = false;    // with F16C and FMA
    bool avx512 = false;  // F, DQ, BW and VL, with the above

  private:
    static bool bit(unsigned word, int at) { return (word >> at & 1u) != 0; }

    static unsigned saved_registers() {  // xgetbv; its intrinsic would need a flag
        unsigned low = 0, high = 0;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return low;
    }

    static bool saves_avx512([[maybe_unused]] unsigned saved) {
#if defined(__APPLE__)
        return true;  // macOS begins to save them when a thread first uses them
#else
        return (saved & 0xe0) == 0xe0;
#endif
    }
};

}  // namespace batchnorm
#endif
