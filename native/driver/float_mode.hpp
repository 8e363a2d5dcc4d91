// A thread's mode of rounding and of treating subnormal numbers.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace batchnorm {

#if defined(__SSE__)
using FloatMode = unsigned;
constexpr FloatMode kFlush = 0x8040;  // results to zero, operands as zero
inline FloatMode float_mode() { return _mm_getcsr(); }
inline void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = std::uint64_t;
constexpr FloatMode kFlush = 1u << 24 | 1u << 19 | 1u;  // FZ, FZ16, FIZ
inline FloatMode float_mode() {
    FloatMode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
inline void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;
constexpr FloatMode kFlush = 0;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
#endif

// While it lives, subnormal numbers count at their value (S16), whatever the thread's mode was:
// XLA's threads flush them, and torch's do after set_flush_denormal(True).
class KeepSubnormals {
  public:
    KeepSubnormals() : before_(float_mode()) {
        if ((before_ & kFlush) != 0) set_float_mode(before_ & ~kFlush);
    }
    ~KeepSubnormals() {
        if ((before_ & kFlush) != 0) set_float_mode(before_);
    }
    KeepSubnormals(const KeepSubnormals&) = delete;
    KeepSubnormals& operator=(const KeepSubnormals&) = delete;

  private:
    FloatMode before_;
};

}  // namespace batchnorm
