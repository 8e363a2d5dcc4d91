// Comparison of results with a reference, and with another run to the bit.
#pragma once

#include <cstdio>

#include "reference.hpp"
#include "run.hpp"

namespace batchnorm::tests {

// Results by name, with the reference's values of the same name.
struct Field {
    const char* name;
    std::vector<double> Result::* values;
    Values Reference::* expected;
};

constexpr Field kFields[] = {
    {"count", &Result::count, &Reference::count},
    {"batch mean", &Result::batch_mean, &Reference::batch_mean},
    {"batch variance", &Result::batch_var, &Reference::batch_var},
    {"y", &Result::y, &Reference::y},
    {"running mean", &Result::mean, &Reference::mean},
    {"running variance", &Result::var, &Reference::var},
    {"moving stddev", &Result::stddev, &Reference::stddev},
    {"renorm mean", &Result::renorm_mean, &Reference::renorm_mean},
    {"renorm stddev", &Result::renorm_stddev, &Reference::renorm_stddev},
    {"dx", &Result::dx, &Reference::dx},
    {"dresidual", &Result::dresidual, &Reference::dresidual},
    {"dgamma", &Result::dgamma, &Reference::dgamma},
    {"dbeta", &Result::dbeta, &Reference::dbeta},
};

inline std::string at(const char* name, std::size_t i, double found, double expected,
                      double error) {
    char text[200];
    std::snprintf(text, sizeof text, "%s[%zu] is %.17g, must be %.17g (to %.3g)", name, i, found,
                  expected, error);
    return text;
}

inline bool is_close(double found, Real expected, Real error, Real most) {
    if (error == kAnything) return true;
    if (std::isnan(expected)) return !std::isfinite(found);
    if (std::isinf(expected)) return found == expected;
    if (std::isinf(found))
        return std::fabs(expected) + error >= most && (found > 0) == (expected > 0);
    return std::fabs(found - expected) <= error;
}

inline Type type_of(const Problem& p, const char* name) {
    if (std::strcmp(name, "dgamma") == 0) return p.gamma_type;
    return std::strcmp(name, "dbeta") == 0 ? p.beta_type : p.type;
}

inline void compare(const Case& c, const Result& found, const Reference& reference) {
    const Problem& p = c.problem;
    for (const Field& field : kFields) {
        const std::vector<double>& values = found.*field.values;
        const Values& expected = reference.*field.expected;
        const Real most = largest(type_of(p, field.name)) * (1 - 2 * half_ulp(p.type));
        for (std::size_t i = 0; i < values.size(); ++i) {
            const Real value = expected.value[i], error = expected.error[i];
            if (is_close(values[i], value, error, most)) continue;
            throw Failure(at(field.name, i, values[i], double(value), double(error)));
        }
    }
    const std::int64_t batches = c.placement.counts_batches ? reference.batches : p.batches;
    if (found.batches != batches) throw Failure("the number of batches is wrong");
}

inline bool same_bits(double a, double b) {
    return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

inline void compare_bits(const char* name, const std::vector<double>& a,
                         const std::vector<double>& b) {
    if (a.size() != b.size()) throw Failure(std::string(name) + ": sizes differ");
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (!same_bits(a[i], b[i])) throw Failure(at(name, i, a[i], b[i], 0));
    }
}

inline void compare_bits(const Result& a, const Result& b) {
    for (const Field& field : kFields) compare_bits(field.name, a.*field.values, b.*field.values);
    if (a.batches != b.batches) throw Failure("the number of batches differs");
}

}  // namespace batchnorm::tests
