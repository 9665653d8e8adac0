// Drives a Team for many short parts: built with ThreadSanitizer, it tells of every access that
// nothing puts in order.
//
// Each part reads what other threads wrote in the part before, as a step's parts do, in plain
// memory: if `run` returned, or a chunk began, before that was written, it would be a data race.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "team.h"

namespace {

constexpr int kMostChunks = 37;

// Whether `parts` parts by `threads` threads count what one thread counts.
bool counts_right(int threads, int parts) {
    veneer::Team team(threads);
    std::vector<int64_t> now(kMostChunks, 1), before(kMostChunks, 1);
    std::vector<int64_t> expected(kMostChunks, 1), last(kMostChunks, 1);
    std::vector<int64_t> by_thread(size_t(threads), 0);  // a chunk may use its thread's scratch
    int64_t done = 0;
    team.call();
    for (int part = 0; part < parts; ++part) {
        const int chunks = part * 7 % (kMostChunks + 1);
        before = now;
        auto work = [&](int chunk, int thread) {
            now[size_t(chunk)] = before[size_t((chunk + 1) % kMostChunks)] + part % 3;
            ++by_thread[size_t(thread)];
        };
        if (part % 2 == 0)
            team.run(chunks, work);
        else  // shares that are not equal
            team.run(chunks,
                     [&](int thread) { return chunks * thread * thread / (threads * threads); },
                     work);
        last = expected;
        for (int chunk = 0; chunk < chunks; ++chunk)
            expected[size_t(chunk)] = last[size_t((chunk + 1) % kMostChunks)] + part % 3;
        if (now != expected) return false;
        done += chunks;
        if (part % 50 == 49) {  // a step ends, another begins
            team.rest();
            if (part % 200 == 199) usleep(200);  // they fall asleep
            team.call();
        }
    }
    team.rest();
    for (const int64_t count : by_thread) done -= count;
    return done == 0;
}

}  // namespace

int main(int count, char** words) {
    const int parts = count > 1 ? std::atoi(words[1]) : 20000;
    for (const int threads : {1, 2, 3, 5}) {
        if (!counts_right(threads, parts)) {
            std::printf("%d threads counted wrong\n", threads);
            return 1;
        }
    }
    for (int i = 0; i < 200; ++i) veneer::Team(3).call();  // ends while they wake
    std::printf("%d parts by 1, 2, 3 and 5 threads: in order\n", parts);
}
