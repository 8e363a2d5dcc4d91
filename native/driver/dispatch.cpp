// The choice of the instruction set.
#include <atomic>
#include <cstring>

#include "features.hpp"
#include "passes/passes.hpp"

// A build for two processors at once, as macOS has them, asks here again.
#if defined(BATCHNORM_X86) && !defined(__x86_64__)
#undef BATCHNORM_X86
#endif

namespace batchnorm {
namespace {

const Instructions* const kBuilt[] = {
    &baseline::instructions,
#if defined(BATCHNORM_X86)
    &avx2::instructions,
    &avx512::instructions,
#endif
};

bool runs_here([[maybe_unused]] const Instructions* instructions) {
#if defined(BATCHNORM_X86)
    const Features features;
    if (instructions == &avx2::instructions) return features.avx2;
    if (instructions == &avx512::instructions) return features.avx512;
#endif
    return true;
}

const Instructions* best() {
    const Instructions* found = kBuilt[0];
    for (const Instructions* instructions : kBuilt) {
        if (runs_here(instructions)) found = instructions;
    }
    return found;
}

}  // namespace

std::atomic<const Instructions*> the_instructions{best()};

const char* instructions_in_use() { return the_instructions.load()->name; }

bool use_instructions(const char* name) {
    for (const Instructions* instructions : kBuilt) {
        if (std::strcmp(instructions->name, name) != 0 || !runs_here(instructions)) continue;
        the_instructions.store(instructions);
        return true;
    }
    return false;
}

}  // namespace batchnorm
