// Prefetches memory while a GEMM computes.
//
// A GEMM of several rows is compute-bound, so there is memory bandwidth left to prefetch what later
// phases read: adapters, which are scattered in memory and read once, and the KV cache. A prefetch
// brings memory to the core's own caches, so each thread prefetches what it will itself read.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <vector>

#include "simd.h"

namespace veneer {

constexpr size_t kLine = 64;  // bytes

// Pieces of memory in the order in which they will be read, thread by thread.
class PrefetchList {
  public:
    static constexpr size_t kLists = 4;  // most lists that a `Prefetcher` takes

    void clear() { pieces_.clear(), ends_.clear(), lines_ = 0; }
    void reserve(size_t pieces, int threads) {
        pieces_.reserve(pieces), ends_.reserve(size_t(threads));
    }

    void add(const void* at, size_t bytes) { add(at, bytes, 1, 0); }

    // Add `runs` runs of `bytes` bytes each, which begin `stride` bytes apart.
    void add(const void* at, size_t bytes, size_t runs, size_t stride) {
        const size_t lines = (bytes + kLine - 1) / kLine;
        assert(pieces_.size() < pieces_.capacity());  // see Gemms::prepare
        lines_ += lines * runs;
        pieces_.push_back({static_cast<const char*>(at), lines, stride, lines_});
    }

    // End a thread's pieces: the next thread will read all that was added since the last call.
    void end_thread() {
        assert(ends_.size() < ends_.capacity());
        ends_.push_back(lines_);
    }

  private:
    friend class Prefetcher;
    // A thread's part of a list is not prefetched if it has more lines than this: its core's cache
    // would not keep them until they are read.
    static constexpr size_t kMax = (2 << 20) / kLine;
    struct Piece {
        const char* at;
        size_t run, stride;  // lines of a run; bytes from one run to the next
        size_t end;          // lines of all pieces up to this one's end
    };
    std::vector<Piece> pieces_;
    std::vector<size_t> ends_;  // lines up to each thread's end; empty: nothing to prefetch
    size_t lines_ = 0;
};

// Prefetches a share of a thread's part of some lists, one list after the other, a few lines at a
// time.
class Prefetcher {
  public:
    bool inputs = true;  // whether the GEMM's inputs are prefetched too, as no tile has read them

    Prefetcher() = default;

    // Prefetch share number `share` of `shares` equal shares of what a thread will read.
    template <size_t Count>
    Prefetcher(const PrefetchList (&lists)[Count], int thread, int share, int shares) {
        static_assert(Count <= PrefetchList::kLists);
        for (const PrefetchList& list : lists) {
            if (list.ends_.empty()) continue;
            lists_[count_] = List(list, thread, share, shares);
            left_ += lists_[count_].left;
            count_ += lists_[count_].left > 0;
        }
    }

    // Spread all that is left evenly over `calls` calls of `prefetch_some`. More than a few lines
    // at once would fill the queue of memory loads, and the GEMM's own loads would wait behind
    // them.
    void spread(size_t calls) { at_once_ = (left_ + calls - 1) / calls; }

    void prefetch_some() {
        for (size_t count = at_once_; count > 0 && now_ < count_;) {
            count -= lists_[now_].prefetch_some(count);
            now_ += lists_[now_].left == 0;
        }
    }

  private:
    struct List {
        List() = default;
        List(const PrefetchList& prefetches, int thread, int share, int shares) {
            const size_t begin = thread > 0 ? prefetches.ends_[size_t(thread) - 1] : 0;
            const size_t all = prefetches.ends_[size_t(thread)] - begin;
            if (all > PrefetchList::kMax) return;
            const size_t first = begin + all * size_t(share) / size_t(shares);
            left = begin + all * size_t(share + 1) / size_t(shares) - first;
            if (left == 0) return;
            const PrefetchList::Piece* pieces = prefetches.pieces_.data();
            piece = std::upper_bound(
                pieces, pieces + prefetches.pieces_.size(), first,
                [](size_t number, const PrefetchList::Piece& other) { return number < other.end; });
            const size_t within = first - (piece == pieces ? 0 : piece[-1].end);
            run = piece->at + within / piece->run * piece->stride;
            next = run + within % piece->run * kLine;
            in_run = piece->run - within % piece->run;
            in_piece = piece->end - first;
        }

        // Prefetch up to `count` lines of one run, and return their number.
        size_t prefetch_some(size_t count) {
            count = std::min({count, in_run, left});
            for (const char* end = next + count * kLine; next < end; next += kLine) prefetch(next);
            left -= count, in_run -= count, in_piece -= count;
            if (in_run == 0 && left > 0) {
                if (in_piece > 0) {
                    next = run += piece->stride;
                } else {
                    in_piece = piece[1].end - piece->end;
                    next = run = (++piece)->at;
                }
                in_run = piece->run;
            }
            return count;
        }

        const PrefetchList::Piece* piece = nullptr;
        const char* run = nullptr;   // where the current run begins
        const char* next = nullptr;  // the run's next line
        size_t in_run = 0, in_piece = 0, left = 0;
    };

    List lists_[PrefetchList::kLists];
    size_t count_ = 0, now_ = 0, left_ = 0, at_once_ = 0;
};

}  // namespace veneer
