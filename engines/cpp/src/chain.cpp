#include "chain.h"

#include <algorithm>
#include <set>

#include "mmdit/error.h"

namespace mmdit {
namespace {

std::string shown(const Ranges& ranges) {
  std::string text;
  for (const auto& [axis, r] : ranges)
    text += (text.empty() ? "" : ",") + axis + "=" + std::to_string(r.min) + ":" + std::to_string(r.opt) + ":" +
            std::to_string(r.max);
  return text;
}

}  // namespace

std::size_t choose_profile(const std::vector<Ranges>& profiles, const Sizes& sizes) {
  std::string misfits, wanted;
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    std::string outside;
    for (const auto& [axis, size] : sizes) {
      const Range& range = profiles[i].at(axis);
      if (size < range.min || size > range.max) outside += (outside.empty() ? "" : " and ") + axis;
    }
    if (outside.empty()) return i;
    misfits += (misfits.empty() ? "" : "; ") + outside + " of " + shown(profiles[i]);
  }
  for (const auto& [axis, size] : sizes) wanted += (wanted.empty() ? "" : ",") + axis + "=" + std::to_string(size);
  throw ContractError("all sizes of a call lie within one profile of the engine", wanted + ", outside " + misfits,
                      "export with --profile " + wanted + ", or with ranges around it");
}

std::vector<std::vector<std::string>> last_read(const std::vector<SegmentRecord>& segments) {
  std::vector<std::vector<std::string>> over(segments.size());
  std::set<std::string> later;
  for (std::size_t i = segments.size(); i-- > 0;) {
    std::set<std::string> here;
    for (const auto* specs : {&segments[i].inputs, &segments[i].outputs})
      for (const TensorSpec& spec : *specs) here.insert(spec.name);
    std::set_difference(here.begin(), here.end(), later.begin(), later.end(), std::back_inserter(over[i]));
    for (const TensorSpec& spec : segments[i].inputs) later.insert(spec.name);
  }
  return over;
}

}  // namespace mmdit
