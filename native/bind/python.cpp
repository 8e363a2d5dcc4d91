// Argument checks and dispatch: addresses and sizes come in, the passes run without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include "batchnorm.hpp"
#include "bind/xla.hpp"

namespace nb = nanobind;
using namespace batchnorm;

namespace {

using Address = std::uintptr_t;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

void check(bool fine, const char* name, const char* rule, Index found) {
    if (fine) return;
    refuse(std::string("kernels: ") + name + " must be " + rule + "; got " + std::to_string(found) +
           ".");
}

Type type_of(int code) {
    check(code >= 0 && code <= 3, "type", "0 (float16), 1 (bfloat16), 2 (float32) or 3 (float64)",
          code);
    return static_cast<Type>(code);
}

// Whether outer rows of this stride, and eight bytes for each element, stay within 63 bits.
bool addressable(const Layout& layout, Index stride) {
    Index row = 0, all = 0, bytes = 0;
    return !__builtin_mul_overflow(layout.channels, layout.inner, &row) &&
           !__builtin_mul_overflow(layout.outer, stride > row ? stride : row, &all) &&
           !__builtin_mul_overflow(all, Index(8), &bytes);
}

// Whether the bytes of its statistics stay within 63 bits; what is allocated for less fails.
bool countable(const Layout& layout) {
    Index all = 0, bytes = 0;
    return !__builtin_mul_overflow(layout.groups, layout.channels, &all) &&
           !__builtin_mul_overflow(all + layout.groups, Index(8 * (Statistics::kRows + 1)), &bytes);
}

// What a forward step keeps for its backward step. An object of our own: a tensor would cost as
// much as a small step.
class Kept {
  public:
    explicit Kept(const Layout& layout)
        : data_(new double[static_cast<std::size_t>(Statistics::doubles(layout))]),
          layout_(layout) {}

    Statistics statistics() const { return {data_.get(), layout_.statistics()}; }

    // Rows of statistics by name, each (groups, channels) and row-major.
    nb::ndarray<nb::numpy, double, nb::ndim<1>> row(int which) {
        check(which >= 0 && which < Statistics::kRows, "row", "one of the rows", which);
        return view(static_cast<Index>(which) * layout_.statistics(), layout_.statistics());
    }

    nb::ndarray<nb::numpy, double, nb::ndim<1>> count() {
        return view(Statistics::kRows * layout_.statistics(), layout_.groups);
    }

    // All of it as one array: for an autograd that keeps arrays only.
    nb::ndarray<nb::numpy, double, nb::ndim<1>> all() {
        return view(0, Statistics::doubles(layout_));
    }

    bool renorm = false;  // whether the step renormalized

    bool fits(const Layout& layout) const {
        return layout.groups == layout_.groups && layout.channels == layout_.channels;
    }

  private:
    nb::ndarray<nb::numpy, double, nb::ndim<1>> view(Index first, Index size) {
        return {data_.get() + first, {static_cast<std::size_t>(size)}, nb::find(this)};
    }

    std::unique_ptr<double[]> data_;
    Layout layout_;
};

using Sums = nb::ndarray<nb::numpy, double, nb::ndim<1>>;
using GivenSums = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The geometry of a call, checked once, for any number of calls.
class Plan {
  public:
    Plan(int type, Index outer, Index channels, Index inner, Index groups, Index run,
         int activation) {
        step_.type = type_of(type);
        check(outer >= 0, "outer", "at least 0", outer);
        check(channels >= 0, "channels", "at least 0", channels);
        check(inner >= 0, "inner", "at least 0", inner);
        check(groups >= 0, "groups", "at least 0", groups);
        check(run >= 1, "run", "at least 1", run);
        check(activation >= 0 && activation <= 2, "activation", "0, 1 or 2", activation);
        step_.layout = {outer, channels, inner, groups, run};
        if (!addressable(step_.layout, 0)) refuse("kernels: x has more elements than memory.");
        if (!countable(step_.layout)) refuse("kernels: x has more statistics than memory.");
        check(groups == 0 ? outer == 0 : outer % groups == 0 && outer / groups % run == 0, "outer",
              "a multiple of groups * run", outer);
        step_.options.activation = static_cast<Activation>(activation);
    }

    void set_mask(int width, Index repeat, Index outer, Index inner) {
        check(width == 1 || width == 2 || width == 4 || width == 8, "mask width", "1, 2, 4 or 8",
              width);
        check(repeat >= 1, "mask repeat", "at least 1", repeat);
        step_.mask = {nullptr, width, repeat, outer, inner};
    }

    void set_team(Address team) { team_ = reinterpret_cast<Team>(team); }

    Kept* moments(Address x, Index x_stride, Address mask, int threads) const {
        auto kept = std::make_unique<Kept>(step_.layout);
        Step step = begin(mask, *kept, threads);
        step.x = array("x", x, x_stride);
        require("x", step.x);
        nb::gil_scoped_release release;
        batchnorm::moments(step);
        return kept.release();
    }

    // Returns what it keeps. Given one that `moments` has filled, and that the caller may have
    // merged with those of others, normalizes by its moments, completes it and returns none.
    Kept* forward(Address x, Index x_stride, Address residual, Index residual_stride, Address mask,
                  Address y, Index y_stride, Address gamma, int gamma_type, Address beta,
                  int beta_type, Address running_mean, int running_type, Address running_var,
                  Address batches, std::optional<nb::tuple> renorm, double eps, double decay,
                  bool batch, bool update, bool unbiased, int threads, Kept* given) const {
        std::unique_ptr<Kept> own;
        if (given == nullptr) own = std::make_unique<Kept>(step_.layout);
        Kept* const kept = given == nullptr ? own.get() : given;
        if (!kept->fits(step_.layout)) refuse("kernels: kept must come from a step of this plan.");
        if (given != nullptr && !batch) refuse("kernels: kept moments need batch=True.");
        Step step = begin(mask, *kept, threads);
        step.x = array("x", x, x_stride);
        require("x", step.x);
        step.residual = array("residual", residual, residual_stride);
        step.y = array("y", y, y_stride);
        require("y", step.y);
        const Type running = type_of(running_type);
        step.gamma = per_channel("gamma", gamma, type_of(gamma_type));
        step.beta = per_channel("beta", beta, type_of(beta_type));
        step.running.mean = per_channel("running_mean", running_mean, running);
        step.running.var = per_channel("running_var", running_var, running);
        step.running.batches = static_cast<std::int64_t*>(aligned("batches", batches, 8));
        Options& options = step.options;
        if (renorm) set_renorm(step, *renorm, running);
        kept->renorm = renorm.has_value();
        options.eps = eps, options.decay = decay;
        options.batch = batch, options.update = update, options.unbiased = unbiased;
        const bool keeps = (step.running.mean && step.running.var) || step_.layout.channels == 0;
        if ((update || renorm) && !keeps) refuse("kernels: an update needs running statistics.");
        if (update && decay < 0 && batches == 0)
            refuse("kernels: the cumulative average needs the number of batches.");
        nb::gil_scoped_release release;
        if (batch && given == nullptr) batchnorm::moments(step);
        batchnorm::normalize(step);
        return own.release();
    }

    // What a step of this plan kept, from the array that `Kept.all` gave.
    Kept* restore(Address data, Index size, bool renorm) const {
        const Index wanted = Statistics::doubles(step_.layout);
        check(size == wanted, "the size of kept", std::to_string(wanted).c_str(), size);
        const auto* first = static_cast<const double*>(aligned("kept", data, 8));
        auto kept = std::make_unique<Kept>(step_.layout);
        std::copy_n(first, size, kept->statistics().data);
        kept->renorm = renorm;
        return kept.release();
    }

    void backward(Address dy, Index dy_stride, Address x, Index x_stride, Address y, Index y_stride,
                  Address mask, Address dx, Index dx_stride, Address dresidual,
                  Index dresidual_stride, Address dgamma, int gamma_type, Address dbeta,
                  int beta_type, const Kept& kept, bool batch, int threads) const {
        Step step = begin_gradient(dy, dy_stride, x, x_stride, y, y_stride, mask, kept, threads);
        step.dx = array("dx", dx, dx_stride);
        step.dresidual = array("dresidual", dresidual, dresidual_stride);
        step.dgamma = per_channel("dgamma", dgamma, type_of(gamma_type));
        step.dbeta = per_channel("dbeta", dbeta, type_of(beta_type));
        step.options.batch = batch;
        check_gate(step, static_cast<bool>(step.dx));
        nb::gil_scoped_release release;
        std::unique_ptr<double[]> sums(new double[sum_count()]);
        if (batch || dgamma != 0 || dbeta != 0 || dresidual != 0)
            batchnorm::reduce(step, sums.get());
        if (step.dx) batchnorm::apply(step, sums.get());
    }

    // The first half of a backward step by the batch's own statistics: sums of g, then of
    // g (x - mean), which the caller may add to those of others.
    Sums reduce(Address dy, Index dy_stride, Address x, Index x_stride, Address y, Index y_stride,
                Address mask, Address dresidual, Index dresidual_stride, Address dgamma,
                int gamma_type, Address dbeta, int beta_type, const Kept& kept, int threads) const {
        Step step = begin_gradient(dy, dy_stride, x, x_stride, y, y_stride, mask, kept, threads);
        step.dresidual = array("dresidual", dresidual, dresidual_stride);
        step.dgamma = per_channel("dgamma", dgamma, type_of(gamma_type));
        step.dbeta = per_channel("dbeta", dbeta, type_of(beta_type));
        check_gate(step, true);
        std::unique_ptr<double[]> sums(new double[sum_count()]());
        {
            nb::gil_scoped_release release;
            batchnorm::reduce(step, sums.get());
        }
        nb::capsule owner(sums.get(), [](void* p) noexcept { delete[] static_cast<double*>(p); });
        return {sums.release(), {sum_count()}, owner};
    }

    // The second half: dx from sums like those of `reduce`, and dresidual at padded rows.
    void apply(Address dy, Index dy_stride, Address x, Index x_stride, Address y, Index y_stride,
               Address mask, Address dx, Index dx_stride, Address dresidual, Index dresidual_stride,
               const GivenSums& sums, const Kept& kept, int threads) const {
        Step step = begin_gradient(dy, dy_stride, x, x_stride, y, y_stride, mask, kept, threads);
        step.dx = array("dx", dx, dx_stride);
        require("dx", step.dx);
        step.dresidual = array("dresidual", dresidual, dresidual_stride);
        check_gate(step, true);
        check(sums.shape(0) == sum_count(), "sums", "two for each statistic",
              static_cast<Index>(sums.shape(0)));
        nb::gil_scoped_release release;
        batchnorm::apply(step, sums.data());
    }

  private:
    Step begin(Address mask, const Kept& kept, int threads) const {
        Step step = step_;
        step.mask.data = aligned("mask", mask, step.mask.width);
        step.statistics = kept.statistics();
        check(threads >= 1, "threads", "at least 1", threads);
        step.options.threads = {threads, team_, nullptr};
        return step;
    }

    Step begin_gradient(Address dy, Index dy_stride, Address x, Index x_stride, Address y,
                        Index y_stride, Address mask, const Kept& kept, int threads) const {
        if (!kept.fits(step_.layout)) refuse("kernels: kept must come from a step of this plan.");
        Step step = begin(mask, kept, threads);
        step.dy = array("dy", dy, dy_stride);
        require("dy", step.dy);
        step.x = array("x", x, x_stride);
        require("x", step.x);
        step.y = array("y", y, y_stride);
        step.options.renorm = kept.renorm;
        return step;
    }

    void check_gate(const Step& step, bool has_dx) const {
        const bool gated = step_.options.activation != Activation::none;
        if (step.dresidual && !(step.y && has_dx && gated))
            refuse("kernels: dresidual needs an activation, y, whose sign it follows, and dx.");
    }

    std::size_t sum_count() const {
        return static_cast<std::size_t>(2 * step_.layout.statistics());
    }

    static void* aligned(const char* name, Address address, Index bytes) {
        check(address % static_cast<Address>(bytes) == 0, name, "aligned to its element size",
              static_cast<Index>(address));
        return reinterpret_cast<void*>(address);
    }

    // Null for an absent array; an empty one may be null too.
    Array array(const char* name, Address address, Index stride) const {
        if (address == 0) return {};
        void* data = aligned(name, address, kBytes[static_cast<int>(step_.type)]);
        const Index row = step_.layout.channels * step_.layout.inner;
        check(step_.layout.outer <= 1 || (stride >= row && addressable(step_.layout, stride)), name,
              "dense within a row, with rows at a positive distance", stride);
        return {data, stride};
    }

    void require(const char* name, const Array& array) const {
        if (!array && step_.layout.statistics() > 0 && step_.layout.positions() > 0)
            refuse(std::string("kernels: ") + name + " is missing; got a null pointer.");
    }

    static PerChannel per_channel(const char* name, Address address, Type type) {
        return {aligned(name, address, kBytes[static_cast<int>(type)]), type};
    }

    static void set_renorm(Step& step, const nb::tuple& renorm, Type type) {
        if (renorm.size() != 7) refuse("kernels: renorm must have 7 entries.");
        step.options.renorm = true;
        step.running.stddev = per_channel("running_stddev", nb::cast<Address>(renorm[0]), type);
        step.running.renorm_mean = per_channel("renorm_mean", nb::cast<Address>(renorm[1]), type);
        step.running.renorm_stddev =
            per_channel("renorm_stddev", nb::cast<Address>(renorm[2]), type);
        if (step.layout.channels > 0 &&
            !(step.running.stddev && step.running.renorm_mean && step.running.renorm_stddev))
            refuse("kernels: renorm needs all its statistics; got a null pointer.");
        step.options.renorm_decay = nb::cast<double>(renorm[3]);
        step.options.rmin = nb::cast<double>(renorm[4]);
        step.options.rmax = nb::cast<double>(renorm[5]);
        step.options.dmax = nb::cast<double>(renorm[6]);
    }

    Step step_;
    Team team_ = nullptr;
};

}  // namespace

NB_MODULE(_cpu, m) {
    nb::set_leak_warnings(false);  // plans live in caches until the interpreter ends
    m.doc() = "Compiled passes of batch normalization; batchnorm.kernels.cpu wraps them.";
    m.def("instructions", [] { return std::string(instructions_in_use()); });
    m.def(
        "use_instructions", [](const std::string& name) { return use_instructions(name.c_str()); },
        nb::arg("name"));
    m.def("xla_handlers", [] {
        nb::dict handlers;
        handlers["batchnorm_forward"] = nb::capsule(bind::kXlaForward);
        handlers["batchnorm_backward"] = nb::capsule(bind::kXlaBackward);
        return handlers;
    });
    nb::class_<Kept>(m, "Kept")
        .def("row", &Kept::row, nb::arg("which"))
        .def("count", &Kept::count)
        .def("all", &Kept::all);
    nb::class_<Plan>(m, "Plan")
        .def(nb::init<int, Index, Index, Index, Index, Index, int>(), nb::arg("type"),
             nb::arg("outer"), nb::arg("channels"), nb::arg("inner"), nb::arg("groups"),
             nb::arg("run"), nb::arg("activation"))
        .def("set_mask", &Plan::set_mask, nb::arg("width"), nb::arg("repeat"), nb::arg("outer"),
             nb::arg("inner"))
        .def("set_team", &Plan::set_team, nb::arg("team"))
        .def("moments", &Plan::moments, nb::rv_policy::take_ownership)
        .def("forward", &Plan::forward, nb::rv_policy::take_ownership, nb::arg("x"),
             nb::arg("x_stride"), nb::arg("residual"), nb::arg("residual_stride"), nb::arg("mask"),
             nb::arg("y"), nb::arg("y_stride"), nb::arg("gamma"), nb::arg("gamma_type"),
             nb::arg("beta"), nb::arg("beta_type"), nb::arg("running_mean"),
             nb::arg("running_type"), nb::arg("running_var"), nb::arg("batches"),
             nb::arg("renorm").none(), nb::arg("eps"), nb::arg("decay"), nb::arg("batch"),
             nb::arg("update"), nb::arg("unbiased"), nb::arg("threads"),
             nb::arg("kept").none() = nb::none())
        .def("restore", &Plan::restore, nb::rv_policy::take_ownership)
        .def("backward", &Plan::backward)
        .def("reduce", &Plan::reduce)
        .def("apply", &Plan::apply);
}
