// Prefetching memory while a GEMM computes.
//
// A GEMM of several rows is compute-bound: meanwhile there is memory bandwidth for what comes
// after, which is adapters, scattered in memory and read once, and the KV cache. A prefetch brings
// memory to the core's own caches, so each thread prefetches what it will read itself.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <vector>

#include "simd.h"

namespace veneer {

constexpr size_t kLine = 64;  // bytes

// Pieces of memory in the order in which they will be read, one thread's after the other's.
class PrefetchList {
  public:
    static constexpr size_t kLists = 4;  // that a `Prefetcher` takes at most

    void clear() { pieces_.clear(), ends_.clear(), lines_ = 0; }
    void reserve(size_t pieces, int threads) {
        pieces_.reserve(pieces), ends_.reserve(size_t(threads));
    }

    void add(const void* at, size_t bytes) { add(at, bytes, 1, 0); }

    // `runs` runs of bytes, `stride` bytes apart.
    void add(const void* at, size_t bytes, size_t runs, size_t stride) {
        const size_t lines = (bytes + kLine - 1) / kLine;
        assert(pieces_.size() < pieces_.capacity());  // see Gemms::prepare
        lines_ += lines * runs;
        pieces_.push_back({static_cast<const char*>(at), lines, stride, lines_});
    }

    // What has been added since the last call is what the next thread will read.
    void end_thread() {
        assert(ends_.size() < ends_.capacity());
        ends_.push_back(lines_);
    }

  private:
    friend class Prefetcher;
    // More is not prefetched for a thread: its core's cache would not keep it until it is read.
    static constexpr size_t kMax = (2 << 20) / kLine;
    struct Piece {
        const char* at;
        size_t run, stride;  // lines of a run, bytes from one to the next
        size_t end;          // lines of all pieces up to this one's end
    };
    std::vector<Piece> pieces_;
    std::vector<size_t> ends_;  // lines, by thread; none: nothing to prefetch
    size_t lines_ = 0;
};

// Prefetches a share of a thread's part of each of some lists, one list after the other, a few
// lines at a time.
class Prefetcher {
  public:
    bool inputs = true;  // prefetch the GEMM's inputs too: no tile has read them yet

    Prefetcher() = default;

    // Share number `share` of `shares` equal ones of what a thread will read.
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

    // Prefetch all that is left in so many calls of `prefetch_some`. More than a few lines at once
    // would fill the queue of loads to memory, and the GEMM's own would wait behind them.
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

        // Prefetch up to `count` lines of one run; returns how many.
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
        const char* run = nullptr;   // the current run's beginning
        const char* next = nullptr;  // the next line of it
        size_t in_run = 0, in_piece = 0, left = 0;
    };

    List lists_[PrefetchList::kLists];
    size_t count_ = 0, now_ = 0, left_ = 0, at_once_ = 0;
};

}  // namespace veneer
