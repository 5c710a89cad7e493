// A TensorRT engine's segments, planned before anything runs: which profile holds a call, and when a tensor between
// two segments was read for the last time.
#ifndef MMDIT_SRC_CHAIN_H
#define MMDIT_SRC_CHAIN_H

#include <string>
#include <vector>

#include "records.h"

namespace mmdit {

// The first profile that holds all sizes: whoever wrote them down put the preferred one first. Throws ContractError.
std::size_t choose_profile(const std::vector<Ranges>& profiles, const Sizes& sizes);

// By segment: those of its tensors that no later one reads.
std::vector<std::vector<std::string>> last_read(const std::vector<SegmentRecord>& segments);

}  // namespace mmdit

#endif
