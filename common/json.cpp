#include "common/json.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "common/text.h"

namespace {
using json = nlohmann::json;
constexpr size_t kMaxDepth = 64;

// Walks the text and keeps its place where the handler can see it: the events of nlohmann's parser carry none.
struct Reader {
    using iterator_category = std::forward_iterator_tag;
    using value_type = char;
    using difference_type = std::ptrdiff_t;
    using pointer = const char*;
    using reference = const char&;
    const char* p = nullptr;
    const char** place = nullptr;
    reference operator*() const { return *p; }
    Reader& operator++() {
        *place = ++p;
        return *this;
    }
    Reader operator++(int) {
        const Reader before = *this;
        ++*this;
        return before;
    }
    bool operator==(const Reader& o) const { return p == o.p; }
};

// Builds the value and refuses what nlohmann's own builder lets pass.
class Builder : public nlohmann::json_sax<json> {
  public:
    Builder(std::string_view text, const std::string& name, Exit code)
        : place(text.data()), text_(text), name_(name), code_(code) {}
    bool null() override { return add(nullptr); }
    bool boolean(bool v) override { return add(v); }
    bool number_integer(number_integer_t v) override { return add(v); }
    bool number_unsigned(number_unsigned_t v) override { return add(v); }
    bool number_float(number_float_t v, const string_t& digits) override {
        if (digits.find_first_of(".eE") == string_t::npos)
            refuse("the integer {} does not fit 64 bits", excerpt(digits));
        return add(v);
    }
    bool string(string_t& v) override { return add(std::move(v)); }
    bool binary(binary_t&) override { return false; }  // never in JSON text
    bool start_object(size_t) override { return open(json::object()); }
    bool start_array(size_t) override { return open(json::array()); }
    bool end_object() override { return close(); }
    bool end_array() override { return close(); }
    bool key(string_t& k) override {
        const auto [it, fresh] = open_.back()->get_ref<json::object_t&>().emplace(k, nullptr);
        if (!fresh) refuse("duplicate key \"{}\"", excerpt(k));
        value_of_key_ = &it->second;
        return true;
    }
    bool parse_error(size_t byte, const std::string&, const nlohmann::detail::exception& e) override {
        // "[json.exception...] parse error at ...: syntax error while parsing value - REASON; last read: '...'"
        std::string_view reason = e.what();
        for (const char* before : {"] ", " - "})
            if (const size_t at = reason.find(before); at != reason.npos)
                reason.remove_prefix(at + std::strlen(before));
        place = text_.data() + std::min(byte > 0 ? byte - 1 : 0, text_.size());
        refuse("not valid JSON: {}", excerpt(reason.substr(0, reason.find("; last read")), 100));
    }
    template <class... A>
    [[noreturn]] void refuse(fmt::format_string<A...> f, A&&... a) const {
        fail(code_, "{}: byte {}: {}", name_, place - text_.data(), fmt::format(f, std::forward<A>(a)...));
    }

    json root;
    const char* place;  // the next byte to be read

  private:
    template <class T>
    json* put(T&& value) {
        if (open_.empty()) return &(root = std::forward<T>(value));
        if (open_.back()->is_object()) return &(*value_of_key_ = std::forward<T>(value));
        return &open_.back()->get_ref<json::array_t&>().emplace_back(std::forward<T>(value));
    }
    template <class T>
    bool add(T&& value) {
        return put(std::forward<T>(value)), true;
    }
    bool open(json&& empty) {
        if (open_.size() == kMaxDepth) refuse("nested deeper than {} levels", kMaxDepth);
        open_.push_back(put(std::move(empty)));
        return true;
    }
    bool close() { return open_.pop_back(), true; }

    std::string_view text_;
    const std::string& name_;
    Exit code_;
    std::vector<json*> open_;  // the arrays and objects around the place; only the last one grows
    json* value_of_key_ = nullptr;
};
}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& name, Exit code, size_t max_bytes) {
    if (text.size() > max_bytes) fail(code, "{}: {} bytes of JSON; expected at most {}", name, text.size(), max_bytes);
    if (text.starts_with("\xEF\xBB\xBF"))
        fail(code, "{}: byte 0: begins with a byte-order mark; save it without", name);
    // To nlohmann's lexer a NUL is the end of the text: what follows would pass unread.
    if (const size_t at = text.find('\0'); at != text.npos) fail(code, "{}: byte {}: a NUL byte", name, at);
    Builder builder(text, name, code);
    const Reader first{text.data(), &builder.place}, last{text.data() + text.size(), &builder.place};
    if (!json::sax_parse(first, last, &builder)) builder.refuse("not valid JSON");
    return std::move(builder.root);
}

std::string as_utf8(const std::string& text) {
    return nlohmann::json::parse(nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}
