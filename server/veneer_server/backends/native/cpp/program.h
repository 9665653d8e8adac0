// What the thread pool executes: a list of phases, each a number of chunks (see thread_pool.h).
#pragma once

#include <cstdint>

namespace veneer {

constexpr int kMaxChunks = 1024;  // of a phase

// The phases of the threads that were preempted while they held a chunk of them.
struct Stragglers {
    const int* phases;
    int count;
};

class Program {
  public:
    virtual ~Program() = default;

    virtual int phases() const = 0;

    // The number of chunks of a phase, up to kMaxChunks. 0: nothing to do in it; -1: ask again,
    // since it has to wait for stragglers. Called for one phase after the other, by any thread,
    // when all chunks of the phase before are finished. It must leave alone what stragglers read
    // and write. Neither this function nor `chunk` may throw: other threads are at work.
    virtual int prepare(int phase, Stragglers stragglers) = 0;

    // The first chunk of a thread's share of a phase. For thread `size`, one past the last, the end
    // of all chunks. Called by threads that are in the phase.
    virtual int begin(int phase, int chunks, int thread, int size) const {
        (void)phase;
        return int(int64_t(chunks) * thread / size);
    }

    // Threads are numbered from 0, the caller of `run`, to size - 1.
    virtual void chunk(int phase, int chunk, int thread) = 0;

    // A thread has executed its chunks of a phase, and may wait now.
    virtual void pause() {}
};

}  // namespace veneer
