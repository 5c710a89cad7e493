// The format: "\x93NUMPY", a version (2 bytes), the header's length (2 bytes, from version 2 on 4), a Python dictionary
// as text, the elements (numpy.lib.format). Nothing in a file is believed before it was looked at.
#include "npy.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

#include "mmdit/error.h"

namespace npy {
namespace {

constexpr std::size_t MAX_HEADER = 65536, MAX_RANK = 8;

// The header's text, read from left to right.
class Header {
 public:
  Header(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw mmdit::UsageError(name_ + " is a NumPy file (.npy) of float32, float16 or bool, in C order", what,
                            "numpy.save(name, numpy.ascontiguousarray(array, numpy.float32))");
  }
  // Whether the next characters are these; they are then behind.
  bool take(std::string_view expected) {
    while (!text_.empty() && (text_[0] == ' ' || text_[0] == '\n')) text_.remove_prefix(1);
    if (text_.substr(0, expected.size()) != expected) return false;
    text_.remove_prefix(expected.size());
    return true;
  }
  void expect(std::string_view expected) {
    if (!take(expected)) fail("a header without " + std::string(expected));
  }
  std::string quoted() {
    expect("'");
    const std::size_t end = text_.find('\'');
    if (end == std::string_view::npos || end > 40) fail("a header with an open string");
    const std::string value(text_.substr(0, end));
    text_.remove_prefix(end + 1);
    return value;
  }
  std::int64_t number() {
    std::int64_t value = 0;
    std::size_t digits = 0;
    take("");
    for (; digits < text_.size() && text_[digits] >= '0' && text_[digits] <= '9'; ++digits) {
      if (digits == 12) fail("a size of too many digits");
      value = value * 10 + (text_[digits] - '0');
    }
    if (!digits) fail("a shape that is none");
    text_.remove_prefix(digits);
    return value;
  }
  mmdit::Shape shape() {
    mmdit::Shape shape;
    expect("(");
    while (!take(")")) {
      if (shape.size() == MAX_RANK) fail("too many axes");
      shape.push_back(number());
      if (!take(",")) {
        expect(")");
        break;
      }
    }
    return shape;
  }
  bool at_end() { return take(""), text_.empty(); }

 private:
  std::string_view text_;
  const std::string& name_;
};

mmdit::DType dtype_of(const std::string& descr, const Header& header) {
  if (descr == "<f4") return mmdit::DType::float32;
  if (descr == "<f2") return mmdit::DType::float16;
  if (descr == "|b1") return mmdit::DType::boolean;
  header.fail("elements of type " + descr);
}

// Fills dtype and shape.
void read_header(Header header, Array& array) {
  bool descr = false, order = false, shape = false;
  header.expect("{");
  while (!header.take("}")) {
    const std::string key = header.quoted();
    header.expect(":");
    if (key == "descr" && !descr) {
      descr = true;
      array.dtype = dtype_of(header.quoted(), header);
    } else if (key == "fortran_order" && !order) {
      order = true;
      if (!header.take("False")) header.fail("an array in Fortran's order");
    } else if (key == "shape" && !shape) {
      shape = true;
      array.shape = header.shape();
    } else {
      header.fail("a header with " + key);
    }
    if (!header.take(",")) {
      header.expect("}");
      break;
    }
  }
  if (!descr || !order || !shape || !header.at_end()) header.fail("an incomplete header");
}

std::size_t number_at(std::string_view bytes, std::size_t at, std::size_t length) {
  std::size_t value = 0;
  for (std::size_t i = length; i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[at + i]);
  return value;
}

}  // namespace

Array parse(std::string_view content, const std::string& name) {
  const Header whole(content, name);
  if (content.size() < 12 || content.substr(0, 6) != "\x93NUMPY") whole.fail("no such file");
  const int version = content[6];
  if (version < 1 || version > 3) whole.fail("version " + std::to_string(version));
  const std::size_t prefix = version == 1 ? 10 : 12;
  const std::size_t length = number_at(content, 8, prefix - 8);
  if (length > MAX_HEADER || prefix + length > content.size())
    whole.fail("a header of " + std::to_string(length) + " bytes");
  Array array;
  read_header(Header(content.substr(prefix, length), name), array);
  const std::string_view data = content.substr(prefix + length);
  // In floating point: a product of sizes that nobody vouches for.
  double bytes = static_cast<double>(mmdit::item_size(array.dtype));
  for (const std::int64_t size : array.shape) bytes *= static_cast<double>(size);
  if (bytes != static_cast<double>(data.size()))
    whole.fail("shape " + mmdit::to_string(array.shape) + " in " + std::to_string(data.size()) + " bytes");
  array.data.assign(data.begin(), data.end());
  return array;
}

Array read(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  const std::string content((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream) Header("", file.string()).fail("a file that cannot be read");
  return parse(content, file.string());
}

void write(const std::filesystem::path& file, const mmdit::Shape& shape, const std::vector<float>& values) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const std::int64_t size : shape) header += std::to_string(size) + ", ";
  header += "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');  // elements begin at a multiple of 64
  header += '\n';
  const char lengths[] = {1, 0, static_cast<char>(header.size() & 0xff), static_cast<char>(header.size() >> 8)};
  std::ofstream stream(file, std::ios::binary);
  stream.write("\x93NUMPY", 6).write(lengths, sizeof lengths) << header;
  stream.write(reinterpret_cast<const char*>(values.data()),
               static_cast<std::streamsize>(values.size() * sizeof(float)));
  stream.close();
  if (!stream) throw mmdit::UsageError("the latent is written to a file", file.string(), "name a folder that is there");
}

}  // namespace npy
