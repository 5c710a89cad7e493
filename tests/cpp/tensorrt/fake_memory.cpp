#include "fake_memory.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fake.h"
#include "fake_streams.h"

namespace fake {
namespace {

constexpr int NAN_BYTE = 0xff;

struct Allocation {
  std::size_t bytes = 0;
  bool there = false;
};

struct Memory {
  std::mutex lock;
  std::map<const char*, Allocation> allocations;

  // The allocation that an address lies in; null where there is none.
  const std::pair<const char* const, Allocation>* at(const void* address) const {
    auto found = allocations.upper_bound(static_cast<const char*>(address));
    if (found == allocations.begin()) return nullptr;
    --found;
    return static_cast<const char*>(address) < found->first + found->second.bytes ? &*found : nullptr;
  }
};

Memory& memory() {
  static Memory the_memory;
  return the_memory;
}

}  // namespace

void* reserve(std::size_t bytes, bool promised) {
  char* const start = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  std::memset(start, NAN_BYTE, bytes);
  const std::lock_guard<std::mutex> guard(memory().lock);
  memory().allocations[start] = {bytes, !promised};
  return start;
}

void come(void* start) {
  const std::lock_guard<std::mutex> guard(memory().lock);
  memory().allocations.at(static_cast<char*>(start)).there = true;
}

void go(void* start) {
  const std::lock_guard<std::mutex> guard(memory().lock);
  const auto found = memory().allocations.find(static_cast<char*>(start));
  if (found == memory().allocations.end() || !found->second.there) return wrong("memory is freed that is not there");
  std::memset(start, NAN_BYTE, found->second.bytes);
  memory().allocations.erase(found);
  std::free(start);
}

bool is_known(const void* address) {
  const std::lock_guard<std::mutex> guard(memory().lock);
  return memory().at(address) != nullptr;
}

bool is_start(const void* address) {
  const std::lock_guard<std::mutex> guard(memory().lock);
  return memory().allocations.count(static_cast<const char*>(address)) != 0;
}

std::size_t allocations() {
  const std::lock_guard<std::mutex> guard(memory().lock);
  return memory().allocations.size();
}

bool usable(const void* address, std::size_t bytes, const char* who) {
  const std::lock_guard<std::mutex> guard(memory().lock);
  const auto* const found = memory().at(address);
  const bool fits =
      found && found->second.there && static_cast<const char*>(address) + bytes <= found->first + found->second.bytes;
  if (!fits)
    wrong(std::string(who) + " uses memory that " +
          (!found                 ? "is freed, or never was there"
           : !found->second.there ? "is not there yet"
                                  : "ends before"));
  return fits;
}

void upload(void* to, const void* host, std::size_t bytes, void* stream) {
  const char* const start = static_cast<const char*>(host);
  enqueue(stream, [to, content = std::vector<char>(start, start + bytes)] {
    if (usable(to, content.size(), "an upload")) std::memcpy(to, content.data(), content.size());
  });
}

void copy(void* to, const void* from, std::size_t bytes, void* stream) {
  enqueue(stream, [=] {
    if (usable(to, bytes, "a copy") && usable(from, bytes, "a copy")) std::memmove(to, from, bytes);
  });
}

void download(void* host, const void* from, std::size_t bytes, void* stream) {
  enqueue(stream, [=] {
    if (usable(from, bytes, "a download")) std::memcpy(host, from, bytes);
  });
  finish(stream);
}

}  // namespace fake
