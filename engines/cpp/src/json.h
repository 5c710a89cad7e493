// JSON that nobody vouches for, read strictly: UTF-8, no name twice in an object, bounded nesting.
#ifndef MMDIT_SRC_JSON_H
#define MMDIT_SRC_JSON_H

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace mmdit {

struct Json {
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the document's order

  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value = nullptr;

  template <typename T>
  const T* as() const {
    return std::get_if<T>(&value);
  }
  bool is_null() const { return as<std::nullptr_t>() != nullptr; }
  // The value of a name; null where this is no object, or has no such name. Linear: for objects of few names.
  const Json* find(std::string_view name) const;
};

// Untrusted text for a message: printable ASCII on one line, of bounded length.
std::string quote(std::string_view text, std::size_t limit = 120);
// A value likewise.
std::string shown(const Json& value);

// The object in `text`. `what` names the document, `fix` says what to do about a broken one.
// Throws BundleError: it is anything else.
Json parse_json_object(std::string_view text, const std::string& what, const std::string& fix);

}  // namespace mmdit

#endif
