#include "common/yaml.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>

#include "common/text.h"

namespace {
constexpr size_t kMaxDepth = 16, kMaxNodes = 10000, kMaxLineBytes = 16384;

// Builds the tree from yaml-cpp's events.  Its own Node would hide anchors, duplicate keys and places.
class Builder : public YAML::EventHandler {
  public:
    Builder(const std::string& text, const std::string& name, Exit code, bool has_lines)
        : text_(text), name_(name), code_(code), has_lines_(has_lines) {}

    void OnDocumentStart(const YAML::Mark& mark) override {
        if (++n_documents > 1) refuse(mark.line, "a second document (---) begins here; expected one");
    }
    void OnDocumentEnd() override {}
    void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
        value(YamlNode::Kind::null, mark, "?", anchor);
    }
    void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override { refuse_alias(mark.line); }
    void OnAnchor(const YAML::Mark& mark, const std::string&) override { refuse_anchor(mark.line); }
    void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  const std::string& s) override {
        if (waits_for_key() && anchor == 0) return key(mark, tag, s);
        YamlNode& node = value(YamlNode::Kind::scalar, mark, tag, anchor);
        node.text = s;
        node.quoted = tag == "!";  // yaml-cpp's mark of a scalar that is not plain
    }
    void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                         YAML::EmitterStyle::value) override {
        open(YamlNode::Kind::list, mark, tag, anchor);
    }
    void OnSequenceEnd() override { open_.pop_back(); }
    void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                    YAML::EmitterStyle::value) override {
        open(YamlNode::Kind::mapping, mark, tag, anchor);
    }
    void OnMapEnd() override { open_.pop_back(); }

    template <class... A>
    [[noreturn]] void refuse(int line_from_0, fmt::format_string<A...> f, A&&... a) const {
        fail(code_, "{}: {}", place(name_, has_lines_ ? line_from_0 + 1 : 0), fmt::format(f, std::forward<A>(a)...));
    }
    [[noreturn]] void refuse_alias(int line) const {
        refuse(line, "an alias (*name) is not allowed; put text that begins with * in quotes");
    }
    [[noreturn]] void refuse_anchor(int line) const {
        refuse(line, "an anchor (&name) is not allowed; put text that begins with & in quotes");
    }

    YamlNode root;
    int n_documents = 0;

  private:
    struct Open {  // a list or mapping around the place; only the last one grows
        YamlNode* node;
        std::map<std::string, int> lines;  // of each key
        bool has_key = false;              // a key that waits for its value is the last item
    };
    bool waits_for_key() const {
        return !open_.empty() && open_.back().node->kind == YamlNode::Kind::mapping && !open_.back().has_key;
    }
    void check_tag(const YAML::Mark& mark, const std::string& tag) const {
        const bool plain = tag.empty() || tag == "?";
        const bool quoted =
            tag == "!" && std::strchr("\"'|>", at(mark));  // an explicit "!" looks the same but for its place
        if (!plain && !quoted) refuse(mark.line, "a tag ({}) is not allowed", excerpt(tag));
    }
    char at(const YAML::Mark& mark) const { return size_t(mark.pos) < text_.size() ? text_[size_t(mark.pos)] : '\n'; }
    void key(const YAML::Mark& mark, const std::string& tag, const std::string& s) {
        check_tag(mark, tag);
        if (s == "<<" && tag != "!") refuse(mark.line, "a merge key (<<) is not allowed");
        if (s.empty()) refuse(mark.line, "an empty key");
        Open& map = open_.back();
        const auto [it, fresh] = map.lines.emplace(s, mark.line + 1);
        if (!fresh) refuse(mark.line, "duplicate key {}, first on line {}", excerpt(s), it->second);
        map.has_key = true;
        YamlNode& item = map.node->items.emplace_back();
        item.key = s;
        item.line = mark.line + 1;
    }
    YamlNode& value(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
        if (anchor != 0) refuse_anchor(mark.line);
        check_tag(mark, tag);
        if (waits_for_key())
            refuse(mark.line, "expected a key (a name, then a colon); is a bracket or quote left open?");
        if (++n_nodes_ > kMaxNodes) refuse(mark.line, "more than {} values", kMaxNodes);
        YamlNode* node = &root;
        if (!open_.empty()) {
            Open& around = open_.back();
            const bool keyed = around.node->kind == YamlNode::Kind::mapping;
            node = keyed ? &around.node->items.back() : &around.node->items.emplace_back();
            if (!keyed) node->line = mark.line + 1;
            around.has_key = false;
        }
        node->kind = kind;
        return *node;
    }
    void open(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
        if (open_.size() == kMaxDepth) refuse(mark.line, "nested deeper than {} levels", kMaxDepth);
        open_.push_back({&value(kind, mark, tag, anchor), {}});
    }

    const std::string& text_;
    const std::string& name_;
    Exit code_;
    bool has_lines_;
    std::vector<Open> open_;
    size_t n_nodes_ = 0;
};

// Length of the valid UTF-8 character at s[i], or 0.
size_t utf8_length(std::string_view s, size_t i) {
    const auto byte = [&](size_t k) { return i + k < s.size() ? static_cast<unsigned char>(s[i + k]) : 0u; };
    const unsigned b = byte(0);
    const size_t n = b < 0x80                ? 1
                     : b >= 0xC2 && b < 0xE0 ? 2
                     : b >= 0xE0 && b < 0xF0 ? 3
                     : b >= 0xF0 && b < 0xF5 ? 4
                                             : 0;
    for (size_t k = 1; k < n; k++)
        if ((byte(k) & 0xC0) != 0x80) return 0;
    const unsigned low = b == 0xE0 ? 0xA0 : b == 0xF0 ? 0x90 : 0x80, high = b == 0xED ? 0x9F : b == 0xF4 ? 0x8F : 0xBF;
    return n > 2 && (byte(1) < low || byte(1) > high) ? 0 : n;  // overlong, surrogate, past U+10FFFF
}

// Refuses bytes that are not lines of text, before any parsing.  yaml-cpp's scanner takes byte 4 for the end of file,
// and keeps the tokens of a whole line, or of all open brackets, before the first event: hence the bounds on both.
void check_text(const std::string& text, const Builder& report) {
    int line = 0;
    size_t n_marks = 0, line_start = 0;
    bool in_indent = true, blank = true;
    for (size_t i = 0; i < text.size();) {
        const char c = text[i];
        const size_t n = utf8_length(text, i);
        if (n == 0) report.refuse(line, "not text: byte {} (0x{:02x}) is not UTF-8", i, static_cast<unsigned char>(c));
        if (c == '\r') report.refuse(line, "a carriage return without a line feed; save the file with LF line ends");
        if ((c >= 0 && c < ' ' && c != '\n' && c != '\t') || c == 0x7f)
            report.refuse(line, "not text: byte {} is the control character 0x{:02x}", i, c);
        if (c == '\t' && in_indent) report.refuse(line, "a tab in the indentation; use spaces");
        if ((c == '[' || c == '{' || c == ',') && ++n_marks > kMaxNodes)
            report.refuse(line, "more than {} brackets and commas", kMaxNodes);
        if (i - line_start > kMaxLineBytes) report.refuse(line, "a line of more than {} bytes", kMaxLineBytes);
        if (c == '\n') line_start = i + 1;
        in_indent = c == '\n' || (in_indent && c == ' ');
        blank = blank && (c == '\n' || c == ' ' || c == '\t');
        line += c == '\n';
        i += n;
    }
    if (blank) report.refuse(-1, "is empty");
}

std::string with_line_feeds(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    for (size_t i = 0; i < text.size(); i++)
        if (text[i] != '\r' || i + 1 == text.size() || text[i + 1] != '\n') out += text[i];
    return out;
}
}  // namespace

YamlNode parse_yaml(std::string_view text, const std::string& name, Exit code, bool has_lines) {
    if (text.size() > kMaxYamlBytes) fail(code, "{}: {} bytes; expected at most {}", name, text.size(), kMaxYamlBytes);
    if (text.starts_with("\xEF\xBB\xBF")) fail(code, "{}: begins with a byte-order mark; save it without", name);
    const std::string lines = with_line_feeds(text);
    Builder builder(lines, name, code, has_lines);
    check_text(lines, builder);
    std::istringstream in(lines);
    try {
        YAML::Parser parser(in);
        while (parser.HandleNextDocument(builder)) {}
    } catch (const YAML::Exception& e) {
        if (e.msg.find("anchor is not defined") != std::string::npos || e.msg.find("alias") != std::string::npos)
            builder.refuse_alias(e.mark.line);
        builder.refuse(e.mark.line, "not valid YAML: {}", excerpt(e.msg, 100));
    }
    if (builder.n_documents == 0 || (builder.root.kind == YamlNode::Kind::null && has_lines))
        builder.refuse(-1, "is empty");
    return std::move(builder.root);
}

std::string place(const std::string& name, int line) { return line > 0 ? fmt::format("{}:{}", name, line) : name; }

std::string yaml_quoted(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\')
            out += '\\', out += c;
        else if (c == '\n' || c == '\t')
            out += c == '\n' ? "\\n" : "\\t";
        else if ((c >= 0 && c < ' ') || c == 0x7f)
            out += fmt::format("\\x{:02x}", c);
        else
            out += c;
    }
    return out + '"';
}
