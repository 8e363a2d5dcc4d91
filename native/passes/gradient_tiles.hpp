// Tiles of gradient sums, for rows of channels and for positions.
#pragma once

#include "gate.hpp"
#include "sums.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

// Adds one tile of n lines to its sums. `g(r)` and `x(r)` are Tiles of line r.
template <bool kLow, class G, class X>
BATCHNORM_INLINE void add_tiles(Index n, const double* mean, const double* low, double* first,
                                double* second, G g, X x) {
    Doubles a[kVectors];
    for (int i = 0; i < kVectors; ++i) a[i] = load_doubles(mean + i * kDoubles);
    TileSums sums(first, second);
    BATCHNORM_NO_UNROLL
    for (Index r = 0; r < n; ++r) {
        const Tile gr = g(r), xr = x(r);
        for (int i = 0; i < kVectors; ++i) {
            Doubles d = xr.v[i] - a[i];
            if (kLow) d -= load_doubles(low + i * kDoubles);
            sums.first[i] = plus(sums.first[i], gr.v[i]);
            sums.second[i] = plus(sums.second[i], gr.v[i] * d);
        }
    }
    sums.store(first, second);
}

// The same in float32: `g(r, i)` and `distance(r, i)`, x - mean, are float vector number i of line
// r.
template <class G, class D>
BATCHNORM_INLINE void add_narrow_tiles(Index n, double* first, double* second, const G& g,
                                       const D& distance) {
    add_narrow(n, first, second, [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
        const Floats gr = g(r, i);
        return Two{gr, gr * distance(r, i)};
    });
}

// The rounding error of a mean in double (`low`) matters to float64 only.
template <class T>
constexpr bool kHasLow = sizeof(T) == 8;

// Less than a tile.
template <class T, class G>
void add_narrow_rest(const T* x, const G* g, Keep keep, Index n, const float* mean, double* first,
                     double* second) {
    float some_x[kTile], some_g[kTile];
    load_rest(x, n, keep, 0.0f, some_x);
    load_rest(g, n, keep, 0.0f, some_g);
    add_narrow_tiles(
        1, first, second,
        [&](Index, int i) BATCHNORM_INLINE_LAMBDA { return load_floats(some_g + i * kFloats); },
        [&](Index, int i) BATCHNORM_INLINE_LAMBDA {
            return load_floats(some_x + i * kFloats) - load_floats(mean + i * kFloats);
        });
}

// From sums around the mean as one float32 to sums around the mean (S3).
void correct(Index n, const double* __restrict mean, const double* __restrict low,
             const double* __restrict sum, double* __restrict product) {
    for (Index c = 0; c < n; ++c)
        product[c] -= ((mean[c] - double(float(mean[c]))) + low[c]) * sum[c];
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
