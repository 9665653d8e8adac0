// A program for the thread pool: a list of phases, each cut into chunks (see thread_pool.h).
#pragma once

#include <cstdint>

namespace veneer {

constexpr int kMaxChunks = 1024;  // most chunks of a phase

// For each thread that was preempted while it held a chunk, the phase of that chunk.
struct Stragglers {
    const int* phases;
    int count;
};

class Program {
  public:
    virtual ~Program() = default;

    virtual int phases() const = 0;

    // Prepare a phase and return its number of chunks, up to kMaxChunks. 0: the phase has nothing
    // to do; -1: it must wait for stragglers, so call again. Called for one phase after the other,
    // by any thread, when all chunks of the previous phase are finished. It must not touch memory
    // that stragglers read or write. Neither this function nor `chunk` may throw, since other
    // threads are running.
    virtual int prepare(int phase, Stragglers stragglers) = 0;

    // The first chunk of a thread's share of a phase. For thread `size`, one past the last thread,
    // the end of all chunks. Called by threads that are in the phase.
    virtual int begin(int phase, int chunks, int thread, int size) const {
        (void)phase;
        return int(int64_t(chunks) * thread / size);
    }

    // Execute a chunk. Threads are numbered from 0, the caller of `run`, to size - 1.
    virtual void chunk(int phase, int chunk, int thread) = 0;

    // Called by a thread that has executed its chunks of a phase and may have to wait now.
    virtual void pause() {}
};

}  // namespace veneer
