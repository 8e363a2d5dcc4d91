// The mask as bits, for passes that read it once for each channel.
#pragma once

#include <memory>

#include "batchnorm.hpp"
#include "tasks.hpp"

namespace batchnorm {

// A step whose mask has bits, where its positions are contiguous: an eighth of a byte for each
// element of a channel, where a mask of bytes would add a quarter to what float32 passes read.
class PackedStep {
  public:
    // `read`: some pass reads the mask; it is packed once, by the first who asks.
    explicit PackedStep(const Step& step, bool read = true) : step_(step) {
        if (!read || !step.mask || step.mask.bits != nullptr || by_rows(step)) return;
        const Layout& layout = step.layout;
        const Index rows = divide_up(layout.outer, step.mask.repeat);
        const Index bytes = divide_up(layout.inner, kAtOnce) * kAtOnce / 8;
        bits_.reset(new unsigned char[static_cast<std::size_t>(rows * bytes + kSlack)]);
        step_.mask.bits = bits_.get(), step_.mask.row = bytes * 8;
        run_tasks(rows, threads_for(step, layout.outer * layout.inner), [&](Index r) {
            for (Index i = 0; i < layout.inner; i += kAtOnce) {
                pack(r * step.mask.outer + i * step.mask.inner, std::min(kAtOnce, layout.inner - i),
                     bits_.get() + r * bytes + i / 8);
            }
        });
    }

    const Step& step() const { return step_; }

  private:
    static constexpr Index kAtOnce = 256, kSlack = 8;  // words are read beyond the end

    // The eight bytes of a word are 0 or 1: the product gathers them in its highest byte.
    void pack(Index first, Index n, unsigned char* bits) const {
        unsigned char keep[kAtOnce] = {};
        read_mask(step_.mask, first, step_.mask.inner, n, keep);
        for (Index i = 0; i < kAtOnce / 8; ++i) {
            std::uint64_t word = 0;
            for (int e = 0; e < 8; ++e) word |= std::uint64_t(keep[i * 8 + e]) << 8 * e;
            bits[i] = static_cast<unsigned char>(word * 0x0102040810204080u >> 56);
        }
    }

    Step step_;
    std::unique_ptr<unsigned char[]> bits_;
};

}  // namespace batchnorm
