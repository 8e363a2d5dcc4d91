// When sums in float32 are good enough (S3): before they are taken, and by what they came to.
//
// Let u = 2^-24. A narrow sum rounds each term, and adds eight of them pairwise before it goes on
// in double: x - anchor is off by u of itself, its square by 3 u, and three additions add 3 u. So
// the sum S of distances is off by at most 4 u of the sum of their sizes, and the sum Q of squares
// by 6 u Q, whatever the count. With shift = S / n and var = Q / n - shift^2, where shift^2 is at
// most kFar var, that is at most 4 u sqrt(1 + kFar) deviations in the mean, and in the variance
// 6 u (1 + kFar) + 8 u sqrt(kFar (1 + kFar)) = 2.3e-6 of it: S3 allows 5e-6 of both. What does
// not keep to that is summed again in double.
#pragma once

#include "batchnorm.hpp"

namespace batchnorm {
namespace {  // each file, with its own compiler flags, has its own copy

constexpr Index kLeastNarrow = 128;  // fewer are summed in double: an anchor would cost more
constexpr Index kMostSamples = 16;   // of which the anchor is the mean
constexpr double kFar = 2.0;

constexpr double kUnsound = -1.0;  // in the place of a variance

// By the count alone, so that a masked batch and the packed one are summed alike (S5).
BATCHNORM_INLINE bool sums_narrowly(Type type, Index count) {
    return type != Type::f64 && count >= kLeastNarrow;
}

// Rows that are spread over all of a group's real ones; unevenly, since data have periods.
BATCHNORM_INLINE Index sample(Index count, Index samples, Index k) {
    const Index apart = count / samples;
    return k * apart + k * 7919 % apart;
}

// Squares of distances below 2^-75 are lost, and others off by up to 2^-150: too much for a mean
// square below 2^-120. Where both sums are 0, x is constant if its next neighbours are further off;
// or else the variance is below 2^-149, which no eps but the smallest lets through.
BATCHNORM_INLINE bool is_sound(double anchor, double shift, double mean_square, double eps) {
    const bool constant =
        (mean_square == 0) & (shift == 0) & ((anchor * anchor >= 0x1p-100) | (eps >= 0x1p-120));
    const bool spread = (mean_square >= 0x1p-120) & (mean_square <= 0x1p126) &
                        (shift * shift * (1.0 + kFar) <= kFar * mean_square);
    return constant | spread;
}

// Products below 2^-126 are off by up to 2^-150, and so is their mean: too much unless that mean is
// 2^24 times as large. Where it is 0, as in channels without gradient or that are constant, all may
// have been lost, each 2^-150 rstd of g x̂: up to this rstd only values that are subnormal there.
BATCHNORM_INLINE bool is_sound_gradient(double count, double rstd, double sum, double product) {
    const double least = count * 0x1p-126;
    const bool large = (product >= least) | (-product >= least);
    const bool none = (product == 0) & (rstd <= 0x1p24);
    return (large | none) & (sum - sum == 0) & (product - product == 0);
}

}  // namespace
}  // namespace batchnorm
