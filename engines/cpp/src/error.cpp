#include "mmdit/error.h"

#include <utility>

namespace mmdit {

Error::Error(std::string rule, std::string received, std::string fix)
    : std::runtime_error(rule + "\n  received: " + received + "\n  fix:      " + fix),
      rule_(std::move(rule)),
      received_(std::move(received)),
      fix_(std::move(fix)) {}

}  // namespace mmdit
