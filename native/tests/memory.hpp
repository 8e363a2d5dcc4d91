// Arrays with guarded surroundings: memory outside an array's rows must neither be written nor
// have an effect.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "batchnorm.hpp"

// Defined only under the address sanitizer.
BATCHNORM_OPTIONAL(void, __asan_poison_memory_region, void const volatile*, std::size_t);
BATCHNORM_OPTIONAL(void, __asan_unpoison_memory_region, void const volatile*, std::size_t);

namespace batchnorm::tests {

// All bits set: NaN in every type, non-zero in every mask.
constexpr int kPattern = 0xff;

class Buffer {
  public:
    Buffer() = default;

    // All sizes in bytes; `shift` is the distance from a boundary that suits every vector.
    Buffer(Index rows, Index row, Index stride, Index shift)
        : rows_(row > 0 ? rows : 0), row_(row), stride_(stride) {
        const Index extent = rows_ > 0 ? (rows_ - 1) * stride + row : 0;
        if (extent > kLargest) {
            map(extent, shift);
        } else {
            allocate(extent, shift);
        }
        for (const Range& range : surroundings_) poison(range);
    }

    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(rows_, other.rows_), std::swap(row_, other.row_);
        std::swap(stride_, other.stride_), std::swap(data_, other.data_);
        std::swap(surroundings_, other.surroundings_), std::swap(block_, other.block_);
        std::swap(mapped_, other.mapped_), std::swap(bytes_, other.bytes_);
        return *this;
    }

    ~Buffer() {
        for (const Range& range : surroundings_) unpoison(range);
        if (mapped_ != nullptr) munmap(mapped_, bytes_);
        ::operator delete(block_, std::align_val_t(kBoundary));
    }

    explicit operator bool() const { return data_ != nullptr; }
    unsigned char* data() const { return data_; }

    // True if the surroundings still hold their pattern.
    bool intact() const {
        for (const Range& range : surroundings_) {
            unpoison(range);
            const bool fine = holds_pattern(range);
            poison(range);
            if (!fine) return false;
        }
        return true;
    }

    // A number that changes with any bit of the rows.
    std::uint64_t fingerprint() const {
        std::uint64_t hash = 14695981039346656037u;
        for (Index r = 0; r < rows_; ++r) {
            const unsigned char* p = data_ + r * stride_;
            for (Index i = 0; i < row_; ++i) hash = (hash ^ p[i]) * 1099511628211u;
        }
        return hash;
    }

  private:
    struct Range {
        unsigned char *begin, *end;
    };

    static constexpr Index kBoundary = 64, kGuard = 512, kLargest = Index(1) << 28;

    void allocate(Index extent, Index shift) {
        const Index bytes = kGuard + shift + extent + kGuard;
        block_ = static_cast<unsigned char*>(
            ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(kBoundary)));
        std::memset(block_, kPattern, static_cast<std::size_t>(bytes));
        data_ = block_ + kGuard + shift;
        surroundings_.push_back({block_, data_});
        for (Index r = 0; r + 1 < rows_; ++r) {
            unsigned char* gap = data_ + r * stride_ + row_;
            if (stride_ > row_) surroundings_.push_back({gap, gap + stride_ - row_});
        }
        surroundings_.push_back({data_ + extent, block_ + bytes});
    }

    // Rows so far apart that they only fit into memory that nobody may touch between them.
    void map(Index extent, Index shift) {
        const Index page = sysconf(_SC_PAGESIZE);
        bytes_ = static_cast<std::size_t>(extent + 4 * page);
        mapped_ =
            mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped_ == MAP_FAILED) throw std::bad_alloc();
        unsigned char* base = static_cast<unsigned char*>(mapped_);
        data_ = base + page + kGuard + shift;
        for (Index r = 0; r < rows_; ++r) {
            unsigned char* row = data_ + r * stride_;
            unsigned char* begin = base + (row - base) / page * page;
            unsigned char* end = base + (row + row_ - base + page - 1) / page * page;
            mprotect(begin, static_cast<std::size_t>(end - begin), PROT_READ | PROT_WRITE);
            std::memset(begin, kPattern, static_cast<std::size_t>(end - begin));
            surroundings_.push_back({begin, row});
            surroundings_.push_back({row + row_, end});
        }
    }

    static bool holds_pattern(const Range& range) {
        for (const unsigned char* p = range.begin; p < range.end; ++p) {
            if (*p != kPattern) return false;
        }
        return true;
    }

    static void poison(const Range& range) {
        if (__asan_poison_memory_region != nullptr)
            __asan_poison_memory_region(range.begin,
                                        static_cast<std::size_t>(range.end - range.begin));
    }

    static void unpoison(const Range& range) {
        if (__asan_unpoison_memory_region != nullptr)
            __asan_unpoison_memory_region(range.begin,
                                          static_cast<std::size_t>(range.end - range.begin));
    }

    Index rows_ = 0, row_ = 0, stride_ = 0;
    unsigned char *data_ = nullptr, *block_ = nullptr;
    std::vector<Range> surroundings_;
    void* mapped_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace batchnorm::tests
