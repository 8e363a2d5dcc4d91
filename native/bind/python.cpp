// The extension as Python sees it: src/batchnorm/kernels/_cpu.pyi has the same names, and a test
// compares the two. All arguments go by name.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "bind/plan.hpp"
#include "bind/xla.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace batchnorm::bind {
namespace {

// The numbers of an enumeration of batchnorm.hpp by name.
nb::dict numbers(std::initializer_list<std::pair<const char*, int>> named) {
    nb::dict found;
    for (const auto& [name, number] : named) found[name] = number;
    return found;
}

int code(Type type) { return static_cast<int>(type); }
int code(Activation activation) { return static_cast<int>(activation); }

void add_functions(nb::module_& m) {
    m.attr("TYPES") = numbers({{"float16", code(Type::f16)},
                               {"bfloat16", code(Type::bf16)},
                               {"float32", code(Type::f32)},
                               {"float64", code(Type::f64)}});
    m.attr("ACTIVATIONS") = numbers({{"none", code(Activation::none)},
                                     {"relu", code(Activation::relu)},
                                     {"leaky_relu", code(Activation::leaky_relu)}});
    using S = Statistics;
    m.attr("STATISTICS") = numbers({{"mean", S::mean},
                                    {"low", S::low},
                                    {"var", S::var},
                                    {"rstd", S::rstd},
                                    {"scale", S::scale},
                                    {"offset", S::offset},
                                    {"r", S::r},
                                    {"d", S::d}});
    m.def("instructions", [] { return std::string(instructions_in_use()); });
    m.def(
        "use_instructions", [](const std::string& name) { return use_instructions(name.c_str()); },
        "name"_a);
    m.def("xla_handlers", [] {
        nb::typed<nb::dict, nb::str, nb::object> handlers;
        handlers["batchnorm_forward"] = nb::capsule(kXlaForward);
        handlers["batchnorm_backward"] = nb::capsule(kXlaBackward);
        return handlers;
    });
}

void add_state(nb::module_& m) {
    const int f32 = code(Type::f32);
    nb::class_<State>(m, "State")
        .def(
            "__init__",
            [](State* self, Address gamma, int gamma_type, Address beta, int beta_type,
               int running_type, Address running_mean, Address running_var, Address batches,
               Address running_stddev, Address renorm_mean, Address renorm_stddev) {
                const Type running = type_of(running_type);
                new (self) State{per_channel("gamma", gamma, type_of(gamma_type)),
                                 per_channel("beta", beta, type_of(beta_type)),
                                 {per_channel("running_mean", running_mean, running),
                                  per_channel("running_var", running_var, running),
                                  static_cast<std::int64_t*>(aligned("batches", batches, 8)),
                                  per_channel("running_stddev", running_stddev, running),
                                  per_channel("renorm_mean", renorm_mean, running),
                                  per_channel("renorm_stddev", renorm_stddev, running)}};
            },
            nb::kw_only(), "gamma"_a = 0, "gamma_type"_a = f32, "beta"_a = 0, "beta_type"_a = f32,
            "running_type"_a = f32, "running_mean"_a = 0, "running_var"_a = 0, "batches"_a = 0,
            "running_stddev"_a = 0, "renorm_mean"_a = 0, "renorm_stddev"_a = 0);
    nb::class_<Renorm>(m, "Renorm")
        .def(
            "__init__",
            [](Renorm* self, double decay, double rmin, double rmax, double dmax) {
                new (self) Renorm{decay, rmin, rmax, dmax};
            },
            nb::kw_only(), "decay"_a, "rmin"_a, "rmax"_a, "dmax"_a);
}

void add_forward(nb::class_<Plan>& plan) {
    plan.def("moments", &Plan::moments, nb::rv_policy::take_ownership, nb::kw_only(), "x"_a,
             "mask"_a, "threads"_a);
    plan.def(
        "forward",
        [](const Plan& self, Address x, Address mask, Address y, Address residual,
           Index residual_row, const State& state, double eps, double decay, bool batch,
           bool update, bool unbiased, const Renorm* renorm, int threads, Kept* kept) {
            return self.forward({x, mask, y, residual, residual_row, state, eps, decay, batch,
                                 update, unbiased, renorm, threads, kept});
        },
        nb::rv_policy::take_ownership, nb::kw_only(), "x"_a, "mask"_a, "y"_a, "residual"_a,
        "residual_row"_a, "state"_a, "eps"_a, "decay"_a, "batch"_a, "update"_a, "unbiased"_a,
        "renorm"_a.none(), "threads"_a, "kept"_a.none());
    plan.def("restore", &Plan::restore, nb::rv_policy::take_ownership, nb::kw_only(), "data"_a,
             "size"_a, "renorm"_a);
}

void add_backward(nb::class_<Plan>& plan) {
    plan.def(
        "backward",
        [](const Plan& self, Address dy, Index dy_row, Address x, Address y, Address mask,
           Address dx, Address dresidual, Address dgamma, int dgamma_type, Address dbeta,
           int dbeta_type, const Kept& kept, bool batch, int threads) {
            self.backward({dy, dy_row, x, y, mask},
                          {dx, dresidual, dgamma, dgamma_type, dbeta, dbeta_type}, kept, batch,
                          threads);
        },
        nb::kw_only(), "dy"_a, "dy_row"_a, "x"_a, "y"_a, "mask"_a, "dx"_a, "dresidual"_a,
        "dgamma"_a, "dgamma_type"_a, "dbeta"_a, "dbeta_type"_a, "kept"_a, "batch"_a, "threads"_a);
    plan.def(
        "reduce",
        [](const Plan& self, Address dy, Index dy_row, Address x, Address y, Address mask,
           Address dresidual, Address dgamma, int dgamma_type, Address dbeta, int dbeta_type,
           const Kept& kept, int threads) {
            return self.reduce({dy, dy_row, x, y, mask},
                               {0, dresidual, dgamma, dgamma_type, dbeta, dbeta_type}, kept,
                               threads);
        },
        nb::kw_only(), "dy"_a, "dy_row"_a, "x"_a, "y"_a, "mask"_a, "dresidual"_a, "dgamma"_a,
        "dgamma_type"_a, "dbeta"_a, "dbeta_type"_a, "kept"_a, "threads"_a);
    plan.def(
        "apply",
        [](const Plan& self, Address dy, Index dy_row, Address x, Address y, Address mask,
           Address dx, Address dresidual, const GivenSums& sums, const Kept& kept, int threads) {
            self.apply({dy, dy_row, x, y, mask}, {dx, dresidual, 0, 0, 0, 0}, sums, kept, threads);
        },
        nb::kw_only(), "dy"_a, "dy_row"_a, "x"_a, "y"_a, "mask"_a, "dx"_a, "dresidual"_a, "sums"_a,
        "kept"_a, "threads"_a);
}

void add_plan(nb::module_& m) {
    nb::class_<Kept>(m, "Kept")
        .def("row", &Kept::row, "which"_a)
        .def("count", &Kept::count)
        .def("all", &Kept::all);
    nb::class_<Plan> plan(m, "Plan");
    plan.def(
        "__init__",
        [](Plan* self, int type, Index outer, Index channels, Index inner, Index groups, Index run,
           Index row, int activation, bool zero_padding) {
            new (self) Plan(type_of(type), {outer, channels, inner, groups, run}, row, activation,
                            zero_padding);
        },
        nb::kw_only(), "type"_a, "outer"_a, "channels"_a, "inner"_a, "groups"_a, "run"_a, "row"_a,
        "activation"_a, "zero_padding"_a);
    plan.def("set_mask", &Plan::set_mask, nb::kw_only(), "width"_a, "repeat"_a, "outer"_a,
             "inner"_a);
    plan.def("set_team", &Plan::set_team, "team"_a);
    add_forward(plan);
    add_backward(plan);
}

}  // namespace
}  // namespace batchnorm::bind

NB_MODULE(_cpu, m) {
    nb::set_leak_warnings(false);  // plans live in caches until the interpreter ends
    m.doc() = "Compiled passes of batch normalization; batchnorm.kernels wraps them.";
    batchnorm::bind::add_functions(m);
    batchnorm::bind::add_state(m);
    batchnorm::bind::add_plan(m);
}
