// Threads that share a step's work by taking chunks of it, and never wait for one that is not
// running.
//
// Each thread has a share of a part's chunks and takes them in order, so that it reads memory
// in order, and so that a later part's share finds in its caches what an earlier one's brought.
// Who has done its own share takes chunks from the end of another's: on few cores some other
// process has one of them now and then, and with fixed shares the step would wait for the
// scheduler to bring the missing thread back, at each of its hundreds of parallel parts. Here
// it goes on alone, and waits for chunks under way only.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace veneer {

class Team {
  public:
    explicit Team(int size) : size_(size), shares_(new Share[size_t(size)]) {
        for (int thread = 1; thread < size; ++thread)
            threads_.emplace_back([this, thread] { serve(thread); });
    }

    ~Team() {
        stopping_.store(true);
        call();
        for (auto& thread : threads_) thread.join();
    }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Wake the others; they look for work until `rest`.
    void call() {
        awake_.store(1, std::memory_order_seq_cst);
        syscall(SYS_futex, &awake_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }
    void rest() { awake_.store(0, std::memory_order_seq_cst); }

    // The first chunk of a thread's share of so many.
    int begin(int chunks, int thread) const { return int(int64_t(chunks) * thread / size_); }

    // Call `function(chunk, thread)` for each of up to 65,535 chunks, where `thread` is 0 for
    // the caller, else 1 to size - 1; all are done on return.
    template <class Function>
    void run(int chunks, const Function& function) {
        run(chunks, [&](int thread) { return begin(chunks, thread); }, function);
    }

    // The same with shares that begin at `begin(thread)`; `begin(size)` is the end.
    template <class Begin, class Function>
    void run(int chunks, const Begin& begin, const Function& function) {
        if (chunks <= 1 || size_ == 1) {
            for (int chunk = 0; chunk < chunks; ++chunk) function(chunk, 0);
            return;
        }
        const uint32_t part = part_.load(std::memory_order_relaxed) + 1;
        what_ = &function;
        work_ = [](const void* what, int chunk, int thread) {
            (*static_cast<const Function*>(what))(chunk, thread);
        };
        done_.store(0, std::memory_order_relaxed);
        // A late comer's exchange compares the part's number too; the release of a share is
        // what makes `what_` and `work_` seen by who takes a chunk of it.
        for (int thread = 0; thread < size_; ++thread)
            shares_[thread].left.store(left(part, begin(thread), begin(thread + 1)),
                                       std::memory_order_release);
        part_.store(part, std::memory_order_release);
        work(part, 0);
        for (int turns = 0; done_.load(std::memory_order_acquire) != chunks;) {
            if (++turns < kSpins)
                _mm_pause();
            else
                sched_yield();
        }
    }

  private:
    static constexpr int kSpins = 2000;

    // A part's number, and which of a share's chunks nobody has begun.
    static uint64_t left(uint32_t part, int begin, int end) {
        return uint64_t(part) << 32 | uint64_t(begin) << 16 | uint64_t(end);
    }
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};

        // A chunk of its beginning for its owner, of its end for others; -1 where none is left.
        int take(uint32_t part, bool owner) {
            uint64_t seen = left.load(std::memory_order_acquire);
            for (;;) {
                const int begin = int(seen >> 16 & 0xffff), end = int(seen & 0xffff);
                if (seen >> 32 != part || begin >= end) return -1;
                const uint64_t next =
                    owner ? Team::left(part, begin + 1, end) : Team::left(part, begin, end - 1);
                if (left.compare_exchange_weak(seen, next, std::memory_order_acq_rel))
                    return owner ? begin : end - 1;
            }
        }
    };

    // Do what is left of a part. The part is there as long as a chunk of it is under way.
    void work(uint32_t part, int thread) {
        int did = 0;
        for (int other = 0; other < size_; ++other) {
            Share& share = shares_[(thread + other) % size_];
            for (;;) {
                const int chunk = share.take(part, other == 0);
                if (chunk < 0) break;
                work_(what_, chunk, thread);
                ++did;
            }
        }
        if (did > 0) done_.fetch_add(did, std::memory_order_release);
    }

    void serve(int thread) {
        uint32_t last = 0;
        for (;;) {
            while (awake_.load(std::memory_order_acquire) == 0)
                syscall(SYS_futex, &awake_, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
            if (stopping_.load()) return;
            const uint32_t part = part_.load(std::memory_order_acquire);
            if (part == last) {
                _mm_pause();
                continue;
            }
            last = part;
            work(part, thread);
        }
    }

    using Work = void (*)(const void* what, int chunk, int thread);

    const int size_;
    std::unique_ptr<Share[]> shares_;
    const void* what_ = nullptr;
    Work work_ = nullptr;
    alignas(64) std::atomic<uint32_t> part_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<uint32_t> awake_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> threads_;  // last: they use the rest
};

}  // namespace veneer
