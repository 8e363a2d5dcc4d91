// One task of each pass, for one element type and instruction set.
#pragma once

#include "batchnorm.hpp"
#include "rows.hpp"

namespace batchnorm {

constexpr Index kMaxLanes = 256;    // channels of a block where rows of channels are contiguous
constexpr Index kWideLanes = 1024;  // the same for passes without sums: longer stretches of memory
constexpr Index kMaxChannels = 32;  // channels of a block where positions are contiguous
constexpr Index kNarrow = 32;       // up to this number of channels several rows make one line

struct Passes {
    // Sums of (x - anchor) and its square, one for each channel of the block; the mean row of
    // step.statistics holds the anchors.
    void (*moments)(const Step& step, const Block& block, double* sum, double* square);
    void (*normalize)(const Step& step, const Block& block);
    // Sums of g and g (x - mean).
    void (*reduce)(const Step& step, const Block& block, double* sum, double* product);
    void (*apply)(const Step& step, const Block& block, const double* sums);
};

struct Instructions {
    const char* name;
    Passes passes[4];  // by Type
    // From channels.hpp.
    void (*load)(const PerChannel& array, Index first, Index n, double* out, Index stride);
    void (*finish_moments)(const Statistics& statistics, Index first, Index n, double count,
                           const double* sum, const double* square, const double* narrow_eps);
    bool (*finish_channels)(const Step& step, Index first, Index end);
    void (*finish_gradients)(const Step& step, const double* sums, Index first, Index end);
};

#define BATCHNORM_DECLARE(isa)              \
    namespace isa {                         \
    extern const Instructions instructions; \
    }
BATCHNORM_DECLARE(baseline)
BATCHNORM_DECLARE(avx2)
BATCHNORM_DECLARE(avx512)
#undef BATCHNORM_DECLARE

}  // namespace batchnorm
