// nlohmann's parser reads the text; here its events become values, and what JSON readers disagree on is refused.
#include "json.h"

#include <nlohmann/json.hpp>
#include <unordered_set>

#include "mmdit/error.h"

namespace mmdit {
namespace {

constexpr std::size_t MAX_NESTING = 64;  // manifests have about ten levels

struct Builder : nlohmann::json_sax<nlohmann::json> {
  struct Open {
    Json value;
    std::string key;                        // of the value that comes next
    std::unordered_set<std::string> names;  // of an object, so far
  };

  Json root;
  std::vector<Open> open;
  std::string refusal;

  bool put(Json made) {
    if (open.empty()) {
      root = std::move(made);
    } else if (auto* array = std::get_if<Json::Array>(&open.back().value.value)) {
      array->push_back(std::move(made));
    } else {
      std::get<Json::Object>(open.back().value.value).emplace_back(std::move(open.back().key), std::move(made));
    }
    return true;
  }
  bool begin(Json opened) {
    if (open.size() == MAX_NESTING) return refuse("JSON nested too deeply");
    open.push_back({std::move(opened), {}, {}});
    return true;
  }
  bool end() {
    Json done = std::move(open.back().value);
    open.pop_back();
    return put(std::move(done));
  }
  bool refuse(std::string why) {
    refusal = std::move(why);
    return false;
  }

  bool null() override { return put({nullptr}); }
  bool boolean(bool value) override { return put({value}); }
  bool number_integer(number_integer_t value) override { return put({static_cast<std::int64_t>(value)}); }
  bool number_unsigned(number_unsigned_t value) override {
    const bool fits = value <= static_cast<number_unsigned_t>(INT64_MAX);
    return fits ? put({static_cast<std::int64_t>(value)}) : put({static_cast<double>(value)});
  }
  bool number_float(number_float_t value, const string_t&) override { return put({value}); }
  bool string(string_t& value) override { return put({std::move(value)}); }
  bool binary(binary_t&) override { return refuse("binary data"); }
  bool start_object(std::size_t) override { return begin({Json::Object{}}); }
  bool start_array(std::size_t) override { return begin({Json::Array{}}); }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }
  bool key(string_t& name) override {
    if (!open.back().names.insert(name).second) return refuse("repeated key " + quote(name));
    open.back().key = std::move(name);
    return true;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    return refuse("not JSON in UTF-8 (" + quote(error.what(), 200) + ")");
  }
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  if (const auto* object = as<Object>())
    for (const auto& [key, member] : *object)
      if (key == name) return &member;
  return nullptr;
}

std::string quote(std::string_view text, std::size_t limit) {
  static const char* const digits = "0123456789abcdef";
  std::string result = "'";
  for (const char c : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      result += c;
    } else {
      result += std::string("\\x") + digits[byte >> 4] + digits[byte & 15];
    }
  }
  return result + "'" + (text.size() > limit ? "... (" + std::to_string(text.size()) + " bytes)" : "");
}

std::string shown(const Json& value) {
  if (const auto* text = value.as<std::string>()) return quote(*text, 80);
  if (const auto* number = value.as<std::int64_t>()) return std::to_string(*number);
  if (const auto* number = value.as<double>()) return std::to_string(*number);
  if (const auto* flag = value.as<bool>()) return *flag ? "true" : "false";
  if (value.is_null()) return "null";
  return value.as<Json::Array>() ? "an array" : "an object";
}

Json parse_json_object(std::string_view text, const std::string& what, const std::string& fix) {
  Builder builder;
  const bool parsed = nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  if (!parsed)
    throw BundleError(what + " must be one JSON object in UTF-8, which names everything once", builder.refusal, fix);
  if (!builder.root.as<Json::Object>())
    throw BundleError(what + " must be one JSON object in UTF-8, which names everything once", shown(builder.root),
                      fix);
  return std::move(builder.root);
}

}  // namespace mmdit
