// The statistics that a forward step keeps for its backward step.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>

#include "bind/checks.hpp"

namespace batchnorm::bind {

using Doubles = nanobind::ndarray<nanobind::numpy, double, nanobind::ndim<1>>;

// An object of our own: a tensor would cost as much as a small step.
class Kept {
  public:
    explicit Kept(const Layout& layout)
        : data_(new double[static_cast<std::size_t>(Statistics::doubles(layout))]()),
          layout_(layout) {}

    Statistics statistics() const { return {data_.get(), layout_.statistics()}; }

    // Rows of statistics by number, each (groups, channels) and row-major.
    Doubles row(int which) {
        check(which >= 0 && which < Statistics::kRows, "row", "one of the rows", which);
        return view(static_cast<Index>(which) * layout_.statistics(), layout_.statistics());
    }

    Doubles count() { return view(Statistics::kRows * layout_.statistics(), layout_.groups); }

    // All rows and counts as one array: for an autograd that keeps arrays only. Rows that a step
    // leaves unset hold zeros.
    Doubles all() { return view(0, Statistics::doubles(layout_)); }

    bool renorm = false;  // true if the step renormalized

    bool fits(const Layout& layout) const {
        return layout.groups == layout_.groups && layout.channels == layout_.channels;
    }

  private:
    Doubles view(Index first, Index size) {
        return {data_.get() + first, {static_cast<std::size_t>(size)}, nanobind::find(this)};
    }

    std::unique_ptr<double[]> data_;
    Layout layout_;
};

}  // namespace batchnorm::bind
