// What a step's parts hand on to each other, laid so that no part overwrites what a thread that
// was put aside may still read or write (see team.h).
//
// Each kind of array has a few places. A part writes each of its results to a place that no
// straggler knows, and reads what was written last. Without stragglers that is the same place all
// the time, which stays in the caches; only hidden states, which a part both reads and writes,
// have two in turn.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "../thread_pool.h"

namespace veneer {

// Numbers that grow with the largest step and are never given back.
template <class Number>
class Buffer {
  public:
    Number* take(size_t count) {
        if (count > size_) {
            at_.reset(), size_ = 0;  // not both at once
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

constexpr int kVersions = 4;  // more stragglers than these allow for are waited for

// One kind of array in its places. Those that are never used take no memory.
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

// Where each part of a step finds and puts what.
class BufferVersions {
  public:
    void reset(int phases) { phases_.resize(size_t(phases)); }

    // Choose places for what a part writes (bits of `Array`); false where stragglers have all.
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

    // The place that a part, or the last one before it that did, writes an array to.
    int wrote(int phase, Array array) const { return phases_[size_t(phase)].version[array]; }

  private:
    struct Phase {
        uint8_t version[kArrays] = {};
    };
    std::vector<Phase> phases_;
};

}  // namespace veneer
