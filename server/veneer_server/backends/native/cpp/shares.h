// Tracks each thread's share of a phase's chunks, and which shares still have chunks that no thread
// has begun (see thread_pool.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace veneer {

// A 64-bit word with the lower half of a phase's number and two small numbers, which change
// together. A late thread finds another phase's number there and does not change the word.
struct PhaseWord {
    static uint64_t packed(uint64_t phase, int high, int low) {
        return phase << 32 | uint64_t(high) << 16 | uint64_t(low);
    }
    static bool is_of(uint64_t word, uint64_t phase) {
        return uint32_t(word >> 32) == uint32_t(phase);
    }
    // Correct even if the lower half overflows, for phases of one program.
    static bool is_before(uint64_t word, uint64_t phase) {
        return int32_t(uint32_t(phase) - uint32_t(word >> 32)) > 0;
    }
    static int high(uint64_t word) { return int(word >> 16 & 0xffff); }
    static int low(uint64_t word) { return int(word & 0xffff); }
};

class Shares {
  public:
    explicit Shares(int size)
        : size_(size),
          words_((size + kBits - 1) / kBits),
          shares_(new Share[size_t(size)]),
          open_(new Open[size_t(words_)]) {}

    // Call before a program whose first phase has this number, while no thread is in a phase.
    void reset(uint64_t first) {
        for (int thread = 0; thread < size_; ++thread)
            shares_[thread].left.store(PhaseWord::packed(first - 1, 0, 0),
                                       std::memory_order_relaxed);
    }

    // Call before a phase: mark all shares as possibly having chunks. Threads cut the shares
    // themselves.
    void open(uint64_t phase) {
        for (int share = 0; share < size_; share += kBits) {
            const uint64_t bits = (uint64_t(1) << std::min(size_ - share, kBits)) - 1;
            open_[share / kBits].shares.store(phase << 32 | bits, std::memory_order_relaxed);
        }
    }

    // Take a chunk of a share: the owner from its beginning, other threads from its end. Returns -1
    // if none is left. `begin_of(owner)` returns where a share begins; the first thread to look at
    // a share cuts it.
    template <class BeginOf>
    int take(uint64_t phase, int owner, int thread, const BeginOf& begin_of) {
        std::atomic<uint64_t>& left = shares_[owner].left;
        uint64_t seen = left.load(std::memory_order_acquire);
        for (;;) {
            int begin = PhaseWord::high(seen), end = PhaseWord::low(seen);
            if (!PhaseWord::is_of(seen, phase)) {
                if (!PhaseWord::is_before(seen, phase)) return -1;  // this thread is late
                begin = begin_of(owner), end = begin_of(owner + 1);
            }
            if (begin >= end) {
                close(phase, owner);
                return -1;
            }
            const bool own = owner == thread;
            const uint64_t next = own ? PhaseWord::packed(phase, begin + 1, end)
                                      : PhaseWord::packed(phase, begin, end - 1);
            if (!left.compare_exchange_weak(seen, next, std::memory_order_acq_rel)) continue;
            if (begin + 1 == end) close(phase, owner);
            return own ? begin : end - 1;
        }
    }

    // The next thread after `thread`, cyclically, whose share may have chunks left; -1 if none has.
    int next_open(uint64_t phase, int thread) const {
        const uint32_t above = ~uint32_t(0) << thread % kBits;
        // The first word's bits from this thread on, then the other words, then the first word's
        // remaining bits.
        for (int turn = 0; turn <= words_; ++turn) {
            const int word = (thread / kBits + turn) % words_;
            const uint64_t seen = open_[word].shares.load(std::memory_order_relaxed);
            if (!PhaseWord::is_of(seen, phase)) return -1;
            uint32_t bits = uint32_t(seen);
            if (turn == 0) bits &= above;
            if (turn == words_) bits &= ~above;
            if (bits != 0) return word * kBits + __builtin_ctz(bits);
        }
        return -1;
    }

  private:
    struct alignas(64) Share {
        // The chunks that no thread has begun, `high` to `low` - 1. The word is of an older phase
        // until a thread takes the first chunk.
        std::atomic<uint64_t> left{0};
    };
    struct alignas(64) Open {
        // In place of the two numbers, a bit for each of 32 shares: it may have chunks left.
        std::atomic<uint64_t> shares{0};
    };

    void close(uint64_t phase, int owner) {
        std::atomic<uint64_t>& shares = open_[owner / kBits].shares;
        const uint64_t bit = uint64_t(1) << owner % kBits;
        uint64_t seen = shares.load(std::memory_order_relaxed);
        while (PhaseWord::is_of(seen, phase) && (seen & bit) != 0 &&
               !shares.compare_exchange_weak(seen, seen & ~bit, std::memory_order_relaxed)) {
        }
    }

    static constexpr int kBits = 32;  // shares of a word of `open_`

    const int size_;
    const int words_;
    std::unique_ptr<Share[]> shares_;  // by thread
    std::unique_ptr<Open[]> open_;     // by 32 threads
};

}  // namespace veneer
