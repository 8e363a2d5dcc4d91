// Two steps as XLA custom calls on the CPU; batchnorm/jax/custom_calls.py is the other side.
#pragma once

namespace batchnorm::bind {

// Addresses of the handlers.
extern void* const kXlaForward;
extern void* const kXlaBackward;

}  // namespace batchnorm::bind
