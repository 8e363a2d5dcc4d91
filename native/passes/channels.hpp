// Computations once per channel, between the passes: core/running.py and core/normalize.py in
// double, for the kernels' own use; the conformance table compares the two.
#pragma once

#include "batchnorm.hpp"
#include "soundness.hpp"

namespace batchnorm::BATCHNORM_ISA {

// n elements from `first` on, `stride` apart, as doubles.
void load(const PerChannel& array, Index first, Index n, double* out, Index stride = 1);

// Mean and variance of n statistics from sums around an anchor, the mean so far (S2, S3). Narrow
// sums, which come with their eps, leave kUnsound as the variance, and the anchor, where they are
// not sound.
void finish_moments(const Statistics& statistics, Index first, Index n, double count,
                    const double* sum, const double* square, const double* narrow_eps);

// rstd, scale and offset of channels [first, end) in every group, and the running update.
// Returns true if any channel was updated (S6, S7, S9-S12).
bool finish_channels(const Step& step, Index first, Index end);

// dgamma and dbeta of channels [first, end) (S8).
void finish_gradients(const Step& step, const double* sums, Index first, Index end);

}  // namespace batchnorm::BATCHNORM_ISA
