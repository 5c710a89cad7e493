// The fake GPU's memory: the host's, and a record of it, so that a use of any other is found.
#ifndef TESTS_FAKE_MEMORY_H
#define TESTS_FAKE_MEMORY_H

#include <cstddef>

namespace fake {

// Memory that is there, or (`promised`) will be when a stream comes to it, full of NaNs: nobody reads what was not
// written.
void* reserve(std::size_t bytes, bool promised);
void come(void* memory);
// Says where it is not there. Its content is lost.
void go(void* memory);
// Whether something is at an address, promised or not.
bool is_known(const void* address);
bool is_start(const void* address);
std::size_t allocations();

// Whether `who` may use so many bytes: says where not.
bool usable(const void* address, std::size_t bytes, const char* who);

// Copies in a stream's order. The host's memory is pageable: what is uploaded is read at once, and a download is waited
// for, as CUDA says (API synchronization behavior).
void upload(void* to, const void* host, std::size_t bytes, void* stream);
void copy(void* to, const void* from, std::size_t bytes, void* stream);
void download(void* host, const void* from, std::size_t bytes, void* stream);

}  // namespace fake

#endif
