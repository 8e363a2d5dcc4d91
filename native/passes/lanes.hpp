// Vectors in the type of the arithmetic: their loads from and stores to every element type, and
// the lanes of a mask.
#pragma once

#include "vector.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class T>
struct VectorType {
    using type = Floats;
};
template <>
struct VectorType<double> {
    using type = Doubles;
};
template <class T>
using Vector = typename VectorType<T>::type;
template <class T>
constexpr int kWidth = sizeof(Vector<T>) / sizeof(Compute<T>);

inline Floats all_lanes(float value) { return Floats{} + value; }
inline Doubles all_lanes(double value) { return Doubles{} + value; }

inline Floats load_floats(const Half* p) {
#if defined(__AVX512F__)
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_maskz_cvtph_ps(0xffff, h);
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Floats v;
    for (int i = 0; i < kFloats; ++i) v[i] = widen(p[i]);
    return v;
#endif
}

inline Floats load_floats(const Bfloat* p) {
#if defined(__AVX512F__)
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, b);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16));
#elif defined(__AVX2__)
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16));
#else
    Floats v;
    for (int i = 0; i < kFloats; ++i) v[i] = widen(p[i]);
    return v;
#endif
}

inline Floats load_lanes(const float* p) { return load_floats(p); }
inline Floats load_lanes(const Half* p) { return load_floats(p); }
inline Floats load_lanes(const Bfloat* p) { return load_floats(p); }
inline Doubles load_lanes(const double* p) { return load_doubles(p); }

inline void store_lanes(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store_lanes(double* p, Doubles v) { __builtin_memcpy(p, &v, sizeof v); }

inline void store_lanes(Half* p, Floats v) {
#if defined(__AVX512F__)
    const __m256i h = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
#elif defined(__F16C__)
    const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
#else
    for (int i = 0; i < kFloats; ++i) narrow(v[i], p[i]);
#endif
}

// As `narrow`: the processors' own conversions flush subnormals.
inline void store_lanes(Bfloat* p, Floats v) {
    typedef std::uint32_t Bits __attribute__((vector_size(kFloats * 4)));
    const Bits bits = Bits(v);
    const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Bits found = v != v ? (bits >> 16 | 0x40u) : rounded;
#if defined(__AVX512F__)
    const __m256i b = _mm512_maskz_cvtepi32_epi16(0xffff, __m512i(found));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b);
#else
    for (int i = 0; i < kFloats; ++i) p[i].bits = std::uint16_t(found[i]);
#endif
}

// Stores past the caches, for memory that nobody reads soon: the line is not read first, and
// displaces none. p is aligned to a vector's bytes. Nothing is ordered after them but what follows
// `settle`.
inline void stream_lanes(float* p, Floats v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, v);
#elif defined(__AVX__)
    _mm256_stream_ps(p, v);
#elif defined(__SSE2__)
    _mm_stream_ps(p, v);
#else
    store_lanes(p, v);
#endif
}

inline void stream_lanes(double* p, Doubles v) {
#if defined(__AVX512F__)
    _mm512_stream_pd(p, v);
#elif defined(__AVX__)
    _mm256_stream_pd(p, v);
#elif defined(__SSE2__)
    _mm_stream_pd(p, v);
#else
    store_lanes(p, v);
#endif
}

template <class T>
inline void stream_lanes(T* p, Floats v) {  // half types
#if defined(__AVX512F__)
    alignas(32) T some[kFloats];
    store_lanes(some, v);
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#elif defined(__AVX__)
    alignas(16) T some[kFloats];
    store_lanes(some, v);
    const __m128i bits = _mm_load_si128(reinterpret_cast<const __m128i*>(some));
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
#else
    store_lanes(p, v);
#endif
}

// Before another thread may read what was streamed.
inline void settle() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Bits that say which elements are real, from some element on; none: all are.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read from bytes of bits");
struct Keep {
    const unsigned char* bits = nullptr;
    Index first = 0;

    BATCHNORM_INLINE explicit operator bool() const { return bits != nullptr; }
    BATCHNORM_INLINE Keep operator+(Index i) const { return {bits, first + i}; }
    // The next elements, the first one lowest; at least 25 of them.
    BATCHNORM_INLINE std::uint32_t word() const {
        std::uint32_t found;
        __builtin_memcpy(&found, bits + (first >> 3), sizeof found);
        return found >> (first & 7);
    }
    BATCHNORM_INLINE bool operator[](Index i) const {
        return (bits[(first + i) >> 3] >> ((first + i) & 7) & 1) != 0;
    }
};

// v where it is real, and 0 elsewhere.
inline Floats keep_lanes(Floats v, Keep keep) {
    const std::uint32_t word = keep.word();
#if defined(__AVX512F__)
    // So that a load before stays a whole one: masked loads that miss the cache are slow.
    __asm__("" : "+v"(v));
    return _mm512_maskz_mov_ps(__mmask16(word), v);
#else
    typedef std::int32_t Bits __attribute__((vector_size(kFloats * 4)));
    Bits one;
    for (int i = 0; i < kFloats; ++i) one[i] = 1 << i;
    const Bits real = ((Bits{} + std::int32_t(word)) & one) == one;
    return Floats(Bits(v) & real);
#endif
}

inline Doubles keep_lanes(Doubles v, Keep keep) {
    const std::uint32_t word = keep.word();
#if defined(__AVX512F__)
    return _mm512_maskz_mov_pd(__mmask8(word), v);
#else
    typedef std::int64_t Bits __attribute__((vector_size(kDoubles * 8)));
    Bits one;
    for (int i = 0; i < kDoubles; ++i) one[i] = 1 << i;
    const Bits real = ((Bits{} + std::int64_t(word)) & one) == one;
    return Doubles(Bits(v) & real);
#endif
}

// The first n elements, and 0.
inline Floats first_lanes(Floats v, Index n) {
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(__mmask16((1u << n) - 1), v);
#else
    typedef std::int32_t Bits __attribute__((vector_size(kFloats * 4)));
    Bits lane;
    for (int i = 0; i < kFloats; ++i) lane[i] = i;
    return Floats(Bits(v) & (lane < std::int32_t(n)));
#endif
}

// The same, from memory that may end there.
template <class T>
inline Vector<T> load_first(const T* p, Index n) {
    T some[kWidth<T>] = {};
    for (Index i = 0; i < kWidth<T>; ++i) {
        if (i < n) some[i] = p[i];
    }
    return load_lanes(some);
}
template <class T>
inline void store_first(T* p, Vector<T> v, Index n) {
    T some[kWidth<T>];
    store_lanes(some, v);
    for (Index i = 0; i < n; ++i) p[i] = some[i];
}

#if defined(__AVX512F__)
inline Floats load_first(const float* p, Index n) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
inline Doubles load_first(const double* p, Index n) {
    return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
inline Floats load_first(const Half* p, Index n) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
inline Floats load_first(const Bfloat* p, Index n) {
    const __m256i b = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, b);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}

inline void store_first(float* p, Floats v, Index n) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
}
inline void store_first(double* p, Doubles v, Index n) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
}
#elif defined(__AVX2__)
inline __m256i first_bits(Index n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load_first(const float* p, Index n) { return _mm256_maskload_ps(p, first_bits(n)); }
inline void store_first(float* p, Floats v, Index n) { _mm256_maskstore_ps(p, first_bits(n), v); }
#endif

// How a vector of elements is read and written: whole, whole and past the caches, or its first n.
struct Whole {
    template <class T>
    BATCHNORM_INLINE Vector<T> load(const T* p) const {
        return load_lanes(p);
    }
    template <class T>
    BATCHNORM_INLINE void store(T* p, Vector<T> v) const {
        store_lanes(p, v);
    }
    BATCHNORM_INLINE Floats keep(Floats v) const { return v; }
};

struct Streamed {
    template <class T>
    BATCHNORM_INLINE Vector<T> load(const T* p) const {
        return load_lanes(p);
    }
    template <class T>
    BATCHNORM_INLINE void store(T* p, Vector<T> v) const {
        stream_lanes(p, v);
    }
};

struct Some {
    Index n;

    template <class T>
    BATCHNORM_INLINE Vector<T> load(const T* p) const {
        return load_first(p, n);
    }
    template <class T>
    BATCHNORM_INLINE void store(T* p, Vector<T> v) const {
        store_first(p, v, n);
    }
    BATCHNORM_INLINE Floats keep(Floats v) const { return first_lanes(v, n); }
};

}  // namespace batchnorm::BATCHNORM_ISA
