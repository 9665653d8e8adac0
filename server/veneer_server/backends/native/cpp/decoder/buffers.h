// The buffers by which the phases of a step pass data on, versioned so that no phase overwrites
// memory that a straggler may still read or write (see thread_pool.h).
//
// Each kind of array has a few versions. A phase writes each of its results to a version that no
// straggler uses, and reads the version written last. Without stragglers that is always the same
// one, which stays in the caches; only hidden states, which a phase both reads and writes,
// alternate between two.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "../thread_pool.h"

namespace veneer {

// An array that grows to the size of the largest step and never shrinks.
template <class Number>
class Buffer {
  public:
    Number* take(size_t count) {
        if (count > size_) {
            at_.reset(), size_ = 0;  // free the old memory first, so as never to hold both
            at_.reset(static_cast<Number*>(::operator new(count * sizeof(Number), kAlign)));
            size_ = count;
        }
        return at_.get();
    }

  private:
    static constexpr std::align_val_t kAlign{64};
    struct Free {
        void operator()(Number* at) const { ::operator delete(at, kAlign); }
    };
    std::unique_ptr<Number, Free> at_;
    size_t size_ = 0;
};

constexpr int kVersions = 4;  // if all are in use, wait for stragglers

// All versions of one kind of array. Versions that are never used take no memory.
template <class Number>
class VersionedBuffer {
  public:
    void take(size_t count) {
        stride_ = (count + 63) / 64 * 64;
        at_ = buffer_.take(stride_ * kVersions);
    }
    Number* operator[](int version) const { return at_ + stride_ * size_t(version); }

  private:
    Buffer<Number> buffer_;
    Number* at_ = nullptr;
    size_t stride_ = 0;
};

// Kinds of arrays.
enum Array { kHidden, kRounded, kY, kShrunk, kQueries, kResults, kLists };
constexpr int kArrays = 7;

// Which version of each array every phase of a step reads and writes.
class BufferVersions {
  public:
    void reset(int phases) { phases_.resize(size_t(phases)); }

    // Choose the versions that a phase writes (`writes`: bits of `Array`). Returns false if
    // stragglers use all versions.
    bool prepare(int phase, unsigned writes, Stragglers stragglers) {
        Phase& now = phases_[size_t(phase)];
        now = phase > 0 ? phases_[size_t(phase - 1)] : Phase{};
        for (int array = 0; array < kArrays; ++array) {
            if (!(writes >> array & 1)) continue;
            unsigned taken = array == kHidden && phase > 0 ? 1u << now.version[array] : 0;
            for (int i = 0; i < stragglers.count; ++i) {
                const int other = stragglers.phases[i];
                taken |= 1u << wrote(other, Array(array));
                if (other > 0) taken |= 1u << wrote(other - 1, Array(array));
            }
            int version = now.version[array];
            if (taken >> version & 1)
                for (version = 0; taken >> version & 1;) ++version;
            if (version >= kVersions) return false;
            now.version[array] = uint8_t(version);
        }
        return true;
    }

    // The version of an array that a phase writes or, if it writes none, the version written last
    // before it.
    int wrote(int phase, Array array) const { return phases_[size_t(phase)].version[array]; }

  private:
    struct Phase {
        uint8_t version[kArrays] = {};
    };
    std::vector<Phase> phases_;
};

}  // namespace veneer
