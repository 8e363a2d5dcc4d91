// The choice of the instruction set.
#include <atomic>
#include <cstring>

#include "passes/passes.hpp"

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
    __builtin_cpu_init();
    if (instructions == &avx2::instructions) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
               __builtin_cpu_supports("fma");
    }
    if (instructions == &avx512::instructions) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
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
