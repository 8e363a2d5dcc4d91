// Tiles of doubles, element types, and their conversions, compiled once for each instruction set.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "batchnorm.hpp"

// Included in files that are compiled with different flags: no name here may be one that the linker
// could merge with another build's, hence the namespace, and no standard templates.
namespace batchnorm::BATCHNORM_ISA {

struct Half {
    std::uint16_t bits;
};
struct Bfloat {
    std::uint16_t bits;
};

template <class T>
struct ComputeType {
    using type = float;
};
template <>
struct ComputeType<double> {
    using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif

constexpr int kFloats = 2 * kDoubles;

typedef double Doubles __attribute__((vector_size(kDoubles * 8)));
typedef float Floats __attribute__((vector_size(kFloats * 4)));

// Sums run in tiles of this many lanes on every machine, so that bits are the same on all.
constexpr int kTile = 16;
constexpr int kVectors = kTile / kDoubles;
constexpr int kFloatVectors = kTile / kFloats;

struct Tile {
    Doubles v[kVectors];
};

// GCC converts generic vectors of float piece by piece, hence the intrinsics.
inline Doubles load_doubles(const float* p) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));  // GCC 12 warns of the plain one
#elif defined(__AVX__)
    return _mm256_cvtps_pd(_mm_loadu_ps(p));
#elif defined(__SSE2__)
    double both;
    __builtin_memcpy(&both, p, sizeof both);
    return _mm_cvtps_pd(_mm_castpd_ps(_mm_set_sd(both)));
#else
    Doubles v;
    for (int i = 0; i < kDoubles; ++i) v[i] = p[i];
    return v;
#endif
}

inline Doubles load_doubles(const double* p) {
    Doubles v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
inline Tile load(const T* p) {
    Tile t;
    for (int i = 0; i < kVectors; ++i) t.v[i] = load_doubles(p + i * kDoubles);
    return t;
}

// a + b, as a fused 1 b + a with the same bits: some machines have separate units for fused ones.
inline Doubles plus(Doubles a, Doubles b) {
#if defined(__AVX512F__)
    return _mm512_fmadd_pd(b, _mm512_set1_pd(1.0), a);
#elif defined(__FMA__)
    return _mm256_fmadd_pd(b, _mm256_set1_pd(1.0), a);
#else
    return a + b;
#endif
}

inline Floats plus(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(b, _mm512_set1_ps(1.0f), a);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(b, _mm256_set1_ps(1.0f), a);
#else
    return a + b;
#endif
}

inline Floats load_floats(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// The two halves of a vector as doubles.
inline Doubles low_doubles(Floats v) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtps_pd(0xff, __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
#elif defined(__AVX__)
    return _mm256_cvtps_pd(_mm256_castps256_ps128(v));
#elif defined(__SSE2__)
    return _mm_cvtps_pd(v);
#else
    Doubles d;
    for (int i = 0; i < kDoubles; ++i) d[i] = v[i];
    return d;
#endif
}

inline Doubles high_doubles(Floats v) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtps_pd(0xff, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#elif defined(__AVX__)
    return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#elif defined(__SSE2__)
    return _mm_cvtps_pd(_mm_movehl_ps(v, v));
#else
    Doubles d;
    for (int i = 0; i < kDoubles; ++i) d[i] = v[i + kDoubles];
    return d;
#endif
}

inline void store_doubles(double* p, const Doubles& v) { __builtin_memcpy(p, &v, sizeof v); }

inline float as_float(std::uint32_t bits) {
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

inline std::uint32_t as_bits(float f) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    return bits;
}

inline float widen(Bfloat b) { return as_float(std::uint32_t(b.bits) << 16); }
inline float widen(float f) { return f; }
inline double widen(double f) { return f; }

inline float widen(Half h) {
    const std::uint32_t magnitude = h.bits & 0x7fffu, shifted = magnitude << 13;
    // Subnormals by a subtraction of normal numbers: right even where threads flush subnormals.
    const std::uint32_t small = as_bits(as_float(shifted + 0x38800000u) - 0x1p-14f);
    const std::uint32_t rebias = magnitude < 0x7c00u ? 0x38000000u : 0x70000000u;
    const std::uint32_t bits = magnitude < 0x0400u ? small : shifted + rebias;
    return as_float(bits | std::uint32_t(h.bits & 0x8000u) << 16);
}

inline void narrow(float f, float& out) { out = f; }
inline void narrow(double f, double& out) { out = f; }

inline void narrow(float f, Bfloat& out) {  // to nearest, ties to even
    std::uint32_t bits = as_bits(f);
    std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    out.bits = std::uint16_t(f != f ? bits >> 16 | 0x40u : rounded);
}

inline void narrow(float f, Half& out) {  // to nearest, ties to even
    std::uint32_t bits = as_bits(f), sign = bits & 0x80000000u;
    bits ^= sign;
    std::uint32_t normal = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
    std::uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;
    std::uint32_t large = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    std::uint32_t h = bits < 0x38800000u ? subnormal : bits < 0x47800000u ? normal : large;
    out.bits = std::uint16_t(h | sign >> 16);
}

template <class T>
inline void widen(const T* in, Compute<T>* out, Index n) {
    for (Index i = 0; i < n; ++i) out[i] = widen(in[i]);
}

template <class T>
inline void narrow(const Compute<T>* in, T* out, Index n) {
    for (Index i = 0; i < n; ++i) narrow(in[i], out[i]);
}

#if defined(__F16C__)
inline void widen(const Half* in, float* out, Index n) {
    Index i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(h));
    }
    for (; i < n; ++i) out[i] = widen(in[i]);
}

inline void narrow(const float* in, Half* out, Index n) {
    Index i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
    }
    for (; i < n; ++i) narrow(in[i], out[i]);
}
#endif

template <>
inline Tile load(const Half* p) {
    float f[kTile];
    widen(p, f, kTile);
    return load(f);
}

template <>
inline Tile load(const Bfloat* p) {
    float f[kTile];
    widen(p, f, kTile);
    return load(f);
}

}  // namespace batchnorm::BATCHNORM_ISA
