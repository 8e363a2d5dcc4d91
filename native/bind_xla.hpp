// Addresses of the XLA custom-call handlers.
#pragma once

namespace batchnorm {

extern void* const kXlaForward;
extern void* const kXlaBackward;

}  // namespace batchnorm
