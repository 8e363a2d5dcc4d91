// The table of one build's passes.
#include "channels.hpp"
#include "passes.hpp"
#include "vector.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class T>
void moments_block(const Step& step, const Block& block, double* sum, double* square);
template <class T>
void normalize_block(const Step& step, const Block& block);
template <class T>
void reduce_block(const Step& step, const Block& block, double* sum, double* product);
template <class T>
void apply_block(const Step& step, const Block& block, const double* sums);

#define BATCHNORM_PASSES(T) {moments_block<T>, normalize_block<T>, reduce_block<T>, apply_block<T>}
#define BATCHNORM_TEXT(name) #name
#define BATCHNORM_NAME(name) BATCHNORM_TEXT(name)

const Instructions instructions = {BATCHNORM_NAME(BATCHNORM_ISA),
                                   {BATCHNORM_PASSES(Half), BATCHNORM_PASSES(Bfloat),
                                    BATCHNORM_PASSES(float), BATCHNORM_PASSES(double)},
                                   load,
                                   finish_moments,
                                   finish_channels,
                                   finish_gradients};

}  // namespace batchnorm::BATCHNORM_ISA
