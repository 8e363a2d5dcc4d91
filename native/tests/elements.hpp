// Element types by plain arithmetic: nothing here is shared with the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "batchnorm.hpp"

namespace batchnorm::tests {

using Real = long double;

inline Index bytes_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

inline const char* name_of(Type type) {
    static const char* const names[] = {"f16", "bf16", "f32", "f64"};
    return names[static_cast<int>(type)];
}

// Bits behind the leading one, and the largest exponent.
struct Format {
    int digits, bias;
};

inline Format format_of(Type type) {
    switch (type) {
        case Type::f16:
            return {10, 15};
        case Type::bf16:
            return {7, 127};
        case Type::f32:
            return {23, 127};
        default:
            return {52, 1023};
    }
}

inline Real half_ulp(Type type) { return std::ldexp(Real(1), -1 - format_of(type).digits); }

inline Real smallest(Type type) {
    const Format f = format_of(type);
    return std::ldexp(Real(1), 1 - f.bias - f.digits);
}

inline Real largest(Type type) {
    const Format f = format_of(type);
    return std::ldexp(2 - std::ldexp(Real(1), -f.digits), f.bias);
}

// The type that elements of `type` are computed in (S16).
inline Type compute_type(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

inline double decode_half(std::uint16_t bits, Type type) {
    const Format f = format_of(type);
    const int fraction = bits & ((1 << f.digits) - 1);
    const int exponent = (bits & 0x7fff) >> f.digits;
    double value;
    if (exponent == 2 * f.bias + 1) {
        value = fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                              : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
        value = std::ldexp(fraction, 1 - f.bias - f.digits);
    } else {
        value = std::ldexp(fraction + (1 << f.digits), exponent - f.bias - f.digits);
    }
    return bits & 0x8000 ? -value : value;
}

inline std::uint16_t encode_half(double value, Type type) {  // to nearest, ties to even
    const Format f = format_of(type);
    const unsigned sign = std::signbit(value) ? 0x8000u : 0u;
    const unsigned infinity = static_cast<unsigned>(2 * f.bias + 1) << f.digits;
    if (std::isnan(value)) return static_cast<std::uint16_t>(sign | infinity | 1u);
    if (std::isinf(value)) return static_cast<std::uint16_t>(sign | infinity);
    int exponent = 0;
    std::frexp(value, &exponent);
    exponent = value == 0 ? 1 - f.bias : std::max(exponent - 1, 1 - f.bias);
    if (exponent > f.bias) return static_cast<std::uint16_t>(sign | infinity);
    const double units = std::nearbyint(std::ldexp(std::fabs(value), f.digits - exponent));
    // The leading one, where there is one, raises the exponent by itself.
    const unsigned bits =
        (static_cast<unsigned>(exponent + f.bias - 1) << f.digits) + static_cast<unsigned>(units);
    return static_cast<std::uint16_t>(sign | bits);
}

template <class T>
T copy_of(const void* data, Index i) {
    T value;
    std::memcpy(&value, static_cast<const char*>(data) + i * Index(sizeof(T)), sizeof(T));
    return value;
}

template <class T>
void copy_to(void* data, Index i, T value) {
    std::memcpy(static_cast<char*>(data) + i * Index(sizeof(T)), &value, sizeof(T));
}

inline double read(Type type, const void* data, Index i) {
    if (type == Type::f64) return copy_of<double>(data, i);
    if (type == Type::f32) return copy_of<float>(data, i);
    return decode_half(copy_of<std::uint16_t>(data, i), type);
}

inline void write(Type type, void* data, Index i, double value) {
    if (type == Type::f64) return copy_to(data, i, value);
    if (type == Type::f32) return copy_to(data, i, static_cast<float>(value));
    copy_to(data, i, encode_half(value, type));
}

// `value` as an element of this type holds it.
inline double rounded(Type type, double value) {
    double held = 0;
    write(type, &held, 0, value);
    return read(type, &held, 0);
}

}  // namespace batchnorm::tests
