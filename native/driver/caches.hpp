// What fits in the caches that the system tells of.
#pragma once

#include "batchnorm.hpp"

namespace batchnorm {

// A visit may be as large as some caches of a core, in a shared one: longer stretches of memory are
// worth more than the nearer cache.
constexpr Index kShared = 8;

// Bytes of a core's own cache.
Index cache_bytes();

// True if an output of x's size is to be written past the caches: it and its input are too large
// for them, so that the next operator would find little of it there, and its lines are written
// whole. That spares them the reading of its lines, and the loss of others. `padded`: padding is
// written too.
bool streams(const Step& step, const Array& output, bool padded);

// From now on, whatever the caches hold and lines are: true if an output and its input have more
// bytes than this; negative: as at the beginning.
void stream_above(Index bytes);

}  // namespace batchnorm
