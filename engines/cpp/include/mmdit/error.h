// Every error that the library raises on purpose: a rule, what was received, and the fix.
#ifndef MMDIT_ERROR_H
#define MMDIT_ERROR_H

#include <stdexcept>
#include <string>

#include "mmdit/api.h"

namespace mmdit {

// what() has one line each for rule, received and fix, as the Python package's errors do.
class MMDIT_API Error : public std::runtime_error {
 public:
  Error(std::string rule, std::string received, std::string fix);

  const std::string& rule() const noexcept { return rule_; }
  const std::string& received() const noexcept { return received_; }
  const std::string& fix() const noexcept { return fix_; }

 private:
  std::string rule_, received_, fix_;
};

// The arguments contradict each other or name something that does not exist.
class MMDIT_API UsageError : public Error {
  using Error::Error;
};

// A bundle is not whole, or not what its manifest says.
class MMDIT_API BundleError : public Error {
  using Error::Error;
};

// A tensor breaks the I/O contract: name, dtype, rank, or an axis out of its range.
class MMDIT_API ContractError : public Error {
  using Error::Error;
};

// This machine, or this build of the library, cannot do it: no such GPU, runtime, version, or memory.
class MMDIT_API MachineError : public Error {
  using Error::Error;
};

}  // namespace mmdit

#endif
