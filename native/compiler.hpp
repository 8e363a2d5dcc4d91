// Words of compilers beyond the standard, for GCC and clang; on Windows that is clang-cl.
#pragma once

#if !defined(__GNUC__) && !defined(__clang__)
#error "batchnorm needs GCC or clang; in Visual Studio choose its clang: cmake -T ClangCL"
#endif

// Files are compiled for several instruction sets; a function that the linker could merge across
// them would run on a machine that lacks its instructions.
#define BATCHNORM_INLINE inline __attribute__((always_inline))
#define BATCHNORM_INLINE_LAMBDA __attribute__((always_inline))

// A function that another library may define; its address is null where none does. Mach-O has no
// such declaration that links without the library, so there the answer is always no.
#if defined(__APPLE__) || defined(_WIN32)
#define BATCHNORM_OPTIONAL(result, name, ...) static constexpr result (*name)(__VA_ARGS__) = nullptr
#else
#define BATCHNORM_OPTIONAL(result, name, ...) \
    extern "C" __attribute__((weak)) result name(__VA_ARGS__)
#endif

// One round of the next loop is long enough to fill the machine's units.
#if defined(__clang__)
#define BATCHNORM_NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define BATCHNORM_NO_UNROLL _Pragma("GCC unroll 1")
#endif
