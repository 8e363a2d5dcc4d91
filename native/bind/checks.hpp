// The binding's checks of arguments, before the passes run.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "batchnorm.hpp"

namespace batchnorm::bind {

using Address = std::uintptr_t;  // 0 where there is no array

[[noreturn]] inline void refuse(const std::string& message) {
    throw nanobind::value_error(message.c_str());
}

inline void check(bool fine, const char* name, const char* rule, Index found) {
    if (fine) return;
    refuse(std::string("kernels: ") + name + " must be " + rule + "; got " + std::to_string(found) +
           ".");
}

inline Type type_of(int code) {
    check(code >= 0 && code <= 3, "type", "0 (float16), 1 (bfloat16), 2 (float32) or 3 (float64)",
          code);
    return static_cast<Type>(code);
}

inline void* aligned(const char* name, Address address, Index bytes) {
    check(address % static_cast<Address>(bytes) == 0, name, "aligned to its element size",
          static_cast<Index>(address));
    return reinterpret_cast<void*>(address);
}

inline PerChannel per_channel(const char* name, Address address, Type type) {
    return {aligned(name, address, kBytes[static_cast<int>(type)]), type};
}

// True if outer rows at this distance, with eight bytes for each element, stay within 63 bits.
inline bool addressable(const Layout& layout, Index row) {
    Index dense = 0, all = 0, bytes = 0;
    return !__builtin_mul_overflow(layout.channels, layout.inner, &dense) &&
           !__builtin_mul_overflow(layout.outer, row > dense ? row : dense, &all) &&
           !__builtin_mul_overflow(all, Index(8), &bytes);
}

// True if the bytes of the statistics stay within 63 bits. Below this bound, an allocation that is
// too large fails by itself.
inline bool countable(const Layout& layout) {
    Index all = 0, bytes = 0;
    return !__builtin_mul_overflow(layout.groups, layout.channels, &all) &&
           !__builtin_mul_overflow(all + layout.groups, Index(8 * (Statistics::kRows + 1)), &bytes);
}

// The distance between rows of an array, in elements.
inline Index checked_row(const Layout& layout, const char* name, Index row) {
    check(layout.outer <= 1 || (row >= layout.channels * layout.inner && addressable(layout, row)),
          name, "dense within a row, with rows at a positive distance", row);
    return row;
}

}  // namespace batchnorm::bind
