// Streams on which nothing happens until the host waits for something, and then in as bad an order as they allow.
//
// Within a stream one operation runs after another, and events order streams. So do CUDA's rules for the default stream
// (handles null and 1): it and the streams that block (of these, a thread's own, 2) wait for each other. All others,
// those that are made and the program's own small numbers, block none and wait for none.
#ifndef TESTS_FAKE_STREAMS_H
#define TESTS_FAKE_STREAMS_H

#include <cstddef>
#include <functional>
#include <memory>

namespace fake {

struct Stream;

// A stream's operations up to one: what an event holds.
struct Mark {
  std::shared_ptr<Stream> stream;
  std::size_t count = 0;
};

// Operations run with a lock held that all of these take: they may call none of them.
void enqueue(void* stream, std::function<void()> operation);
Mark mark(void* stream);
void wait(void* stream, const Mark& mark);
// Forgets a handle; what was enqueued there still runs.
void forget(void* stream);

// The host waits for a stream, and for the device.
void finish(void* stream);
void finish_all();
// How often it did.
int host_waits();
// Operations that were not run.
std::size_t pending();

}  // namespace fake

#endif
