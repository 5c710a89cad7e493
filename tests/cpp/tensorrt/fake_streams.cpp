#include "fake_streams.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <iterator>
#include <map>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

namespace fake {

struct Operation {
  std::function<void()> run;
  std::vector<Mark> after;
};

struct Stream {
  bool blocking = false;
  std::deque<Operation> queue;
  std::size_t done = 0;
};

namespace {

using Shared = std::shared_ptr<Stream>;

bool reached(const Mark& mark) { return mark.stream->done >= mark.count; }
Mark end_of(const Shared& stream) { return {stream, stream->done + stream->queue.size()}; }

bool ready(const Shared& stream) {
  if (stream->queue.empty()) return false;
  const std::vector<Mark>& after = stream->queue.front().after;
  return std::all_of(after.begin(), after.end(), reached);
}

void step(Stream& stream) {
  const Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  if (operation.run) operation.run();
  ++stream.done;
}

class Device {
 public:
  // A handle's stream, made with its first use.
  Shared of(void* handle) {
    static thread_local char per_thread;
    const auto number = reinterpret_cast<std::uintptr_t>(handle);
    if (number == 2) handle = &per_thread;
    Shared& found = streams_[number == 1 ? nullptr : handle];
    if (!found) {
      found = std::make_shared<Stream>();
      found->blocking = number <= 2;
      all_.push_back(found);
    }
    return found;
  }

  void add(const Shared& stream, Operation operation) {
    const Shared main = of(nullptr);
    for (const Shared& other : all_)
      if (other != stream && other->blocking && stream->blocking && (other == main || stream == main))
        operation.after.push_back(end_of(other));
    stream->queue.push_back(std::move(operation));
  }

  void forget(void* handle) { streams_.erase(handle); }

  // Runs operations until one has run: those that it needs and no others, or any that may run, as it falls.
  void reach(const Mark& goal) {
    if (random_() % 2) {
      need(goal);
    } else {
      while (!reached(goal)) step(*any());
    }
    all_.erase(std::remove_if(all_.begin(), all_.end(),
                              [](const Shared& s) { return s.use_count() == 1 && s->queue.empty(); }),
               all_.end());
  }

  void reach_all() {
    for (const Shared& stream : std::vector<Shared>(all_)) reach(end_of(stream));
  }

  std::size_t pending() const {
    std::size_t count = 0;
    for (const Shared& stream : all_) count += stream->queue.size();
    return count;
  }

  std::mutex lock;
  int host_waits = 0;

 private:
  void need(const Mark& goal) {
    while (!reached(goal)) {
      for (const Mark& mark : std::vector<Mark>(goal.stream->queue.front().after)) need(mark);
      step(*goal.stream);
    }
  }

  Shared any() {
    std::vector<Shared> candidates;
    std::copy_if(all_.begin(), all_.end(), std::back_inserter(candidates), ready);
    return candidates[random_() % candidates.size()];
  }

  std::map<void*, Shared> streams_;
  std::vector<Shared> all_;  // those that were forgotten too, while there is work left
  std::mt19937 random_{7};
};

Device& device() {
  static Device the_device;
  return the_device;
}

}  // namespace

void enqueue(void* stream, std::function<void()> operation) {
  const std::lock_guard<std::mutex> guard(device().lock);
  device().add(device().of(stream), {std::move(operation), {}});
}

Mark mark(void* stream) {
  const std::lock_guard<std::mutex> guard(device().lock);
  device().add(device().of(stream), {});
  return end_of(device().of(stream));
}

void wait(void* stream, const Mark& mark) {
  const std::lock_guard<std::mutex> guard(device().lock);
  device().add(device().of(stream), {nullptr, mark.stream ? std::vector<Mark>{mark} : std::vector<Mark>{}});
}

void forget(void* stream) {
  const std::lock_guard<std::mutex> guard(device().lock);
  device().forget(stream);
}

void finish(void* stream) {
  const Mark goal = mark(stream);
  const std::lock_guard<std::mutex> guard(device().lock);
  ++device().host_waits;
  device().reach(goal);
}

void finish_all() {
  const std::lock_guard<std::mutex> guard(device().lock);
  ++device().host_waits;
  device().reach_all();
}

int host_waits() {
  const std::lock_guard<std::mutex> guard(device().lock);
  return device().host_waits;
}

std::size_t pending() {
  const std::lock_guard<std::mutex> guard(device().lock);
  return device().pending();
}

}  // namespace fake
