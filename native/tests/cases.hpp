// A case: its numbers, and their place in memory.
#pragma once

#include <sstream>
#include <string>

#include "memory.hpp"
#include "problem.hpp"

namespace batchnorm::tests {

// The form of a case in memory: the places of its arrays, and the arrays that exist.
struct Placement {
    bool masked = false, huge = false;
    Mask mask;  // without data
    bool wants_dx = true, wants_dresidual = false, wants_dgamma = true, wants_dbeta = true;
    bool counts_batches = true;
};

struct Case {
    std::uint64_t seed = 0;
    Problem problem;
    Placement placement;
    Buffer mask;
};

// x[mask] as a case of its own (S5): for rows of channels in one group.
inline Case pack(const Case& c) {
    const Problem& p = c.problem;
    Case packed;
    packed.seed = c.seed + 1, packed.problem = p, packed.placement = c.placement;
    packed.placement.masked = packed.placement.huge = false;
    Problem& q = packed.problem;
    q.x.clear(), q.dy.clear(), q.residual.clear();
    for (Index o = 0; o < p.layout.outer; ++o) {
        if (!p.is_real(o, 0)) continue;
        const auto first = p.at(o, 0, 0), end = p.at(o + 1, 0, 0);
        q.x.insert(q.x.end(), p.x.begin() + first, p.x.begin() + end);
        q.dy.insert(q.dy.end(), p.dy.begin() + first, p.dy.begin() + end);
        if (p.residual.empty()) continue;
        q.residual.insert(q.residual.end(), p.residual.begin() + first, p.residual.begin() + end);
    }
    Index rows = 0;
    for (char real : p.real) rows += real;
    q.layout.outer = rows;
    q.layout.run = 1;
    q.real.assign(static_cast<std::size_t>(rows), 1);
    return packed;
}

inline std::string describe(const Case& c) {
    const Problem& p = c.problem;
    const Placement& place = c.placement;
    const Options& o = p.options;
    std::ostringstream text;
    text << "case " << c.seed << ": " << name_of(p.type) << " (" << p.layout.outer << ", "
         << p.layout.channels << ", " << p.layout.inner << "), groups " << p.layout.groups
         << ", run " << p.layout.run << (place.huge ? ", huge strides" : "");
    if (place.masked) {
        Index real = 0;
        for (char r : p.real) real += r;
        text << "; mask of width " << place.mask.width << ", repeat " << place.mask.repeat
             << ", strides " << place.mask.outer << " and " << place.mask.inner << ", " << real
             << " real positions";
    }
    text << "; " << (o.batch ? "batch" : "running") << ", eps " << o.eps << ", activation "
         << static_cast<int>(o.activation) << ", residual " << !p.residual.empty() << ", padding "
         << (o.zero_padding ? "0" : "normalized");
    text << "; gamma " << (p.gamma.empty() ? "none" : name_of(p.gamma_type)) << ", beta "
         << (p.beta.empty() ? "none" : name_of(p.beta_type));
    text << "; statistics " << (p.has_running ? name_of(p.running_type) : "none") << ", update "
         << o.update << ", unbiased " << o.unbiased << ", decay " << o.decay << ", batches "
         << (place.counts_batches ? p.batches : -1);
    if (o.renorm) {
        text << "; renorm decay " << o.renorm_decay << ", r in " << o.rmin << " to " << o.rmax
             << ", d to " << o.dmax;
    }
    text << "; backward: y " << p.reads_y << ", dx " << place.wants_dx << ", dresidual "
         << place.wants_dresidual << ", dgamma " << place.wants_dgamma << ", dbeta "
         << place.wants_dbeta;
    return text.str();
}

}  // namespace batchnorm::tests
