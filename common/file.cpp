#include "common/file.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <mutex>
#include <utility>

namespace {
struct Fd {  // closes on every way out
    int fd;
    explicit Fd(int f) : fd(f) {}
    Fd(const Fd&) = delete;
    Fd& operator=(const Fd&) = delete;
    ~Fd() {
        if (fd >= 0) ::close(fd);
    }
};

// The exit code after a refused open.  An error about the file (absent, a directory, not permitted to this user) gets
// the caller's code, any other error of the system Exit::io.
Exit refusal(Exit code) {
    const bool about_the_file = errno == ENOENT || errno == ENOTDIR || errno == EACCES || errno == ELOOP ||
                                errno == ENAMETOOLONG || errno == EISDIR;
    return about_the_file ? code : Exit::io;
}

// Opens a regular file for reading and reports its size.
int open_regular(const fs::path& path, Exit code, size_t& size) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) fail(refusal(code), "{}: cannot open: {}", path.string(), errno_text(errno));
    struct stat st {};
    if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        ::close(fd);
        fail(code, "{}: {}; expected a regular file", path.string(),
             S_ISDIR(st.st_mode) ? "is a directory" : "is not a file");
    }
    size = size_t(st.st_size);
    return fd;
}

// A read through a map of a truncated file: the handler jumps back into MappedFile::read of the same thread.
// volatile, and fenced below: the compiler sees no reader between the two writes and would drop the first.
thread_local sigjmp_buf* volatile bus_jump = nullptr;
void on_sigbus(int) {
    if (bus_jump) siglongjmp(*bus_jump, 1);
    std::signal(SIGBUS, SIG_DFL);  // not ours: the repeated access ends the process
}
void catch_sigbus() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_handler = on_sigbus;
        action.sa_flags = SA_NODEFER;
        ::sigaction(SIGBUS, &action, nullptr);
    });
}
}  // namespace

MappedFile::MappedFile(const fs::path& path, Exit code) : path_(path), code_(code) {
    catch_sigbus();
    const Fd file(open_regular(path, code, size_));
    struct stat st {};
    ::fstat(file.fd, &st);
    device_ = st.st_dev;
    inode_ = st.st_ino;
    if (size_ == 0) return;
    void* p = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.fd, 0);
    if (p == MAP_FAILED) fail(Exit::io, "{}: cannot map {} bytes: {}", path.string(), size_, errno_text(errno));
    data_ = static_cast<const std::byte*>(p);
}

MappedFile::MappedFile(MappedFile&& o) noexcept
    : path_(std::move(o.path_)),
      code_(o.code_),
      data_(std::exchange(o.data_, nullptr)),
      size_(std::exchange(o.size_, 0)),
      device_(o.device_),
      inode_(o.inode_) {}

MappedFile::~MappedFile() {
    if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::read(size_t offset, void* to, size_t n) const {
    CHECK_THAT(offset <= size_ && n <= size_ - offset, "{}: read of [{}, {}+{}) from {} bytes", path_.string(), offset,
               offset, n, size_);
    sigjmp_buf here;
    if (sigsetjmp(here, 1) != 0) {
        bus_jump = nullptr;
        fail_shrunk(offset);
    }
    bus_jump = &here;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    std::memcpy(to, data_ + offset, n);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    bus_jump = nullptr;
    // Within the last page a truncated file reads as zeros, without a signal.  A deleted or replaced file (another
    // inode) stays whole under the map.
    struct stat st {};
    if (::stat(path_.c_str(), &st) == 0 && st.st_dev == device_ && st.st_ino == inode_ &&
        size_t(st.st_size) < offset + n)
        fail_shrunk(offset);
}

void MappedFile::fail_shrunk(size_t offset) const {
    fail(code_, "{}: shrank while it was in use (a read at byte {} of {} failed); restore the file and resume",
         path_.string(), offset, size_);
}

OutFile::OutFile(const fs::path& path, bool append) : path_(path) {
    fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | (append ? O_APPEND : O_TRUNC), 0666);
    if (fd_ < 0) fail(Exit::io, "{}: cannot create: {}", path.string(), errno_text(errno));
}

OutFile::~OutFile() {
    if (fd_ >= 0) ::close(fd_);
}

void OutFile::write(const void* data, size_t n_bytes) {
    const char* p = static_cast<const char*>(data);
    while (n_bytes > 0) {
        const ssize_t n = ::write(fd_, p, n_bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) fail(Exit::io, "{}: cannot write {} bytes: {}", path_.string(), n_bytes, errno_text(errno));
        p += n;
        n_bytes -= size_t(n);
    }
}

void OutFile::sync() {
    if (::fsync(fd_) != 0) fail(Exit::io, "{}: cannot fsync: {}", path_.string(), errno_text(errno));
}

void OutFile::close() {
    sync();
    if (::close(std::exchange(fd_, -1)) != 0) fail(Exit::io, "{}: cannot close: {}", path_.string(), errno_text(errno));
}

std::string read_text(const fs::path& path, size_t max_bytes, Exit code) {
    size_t size = 0;
    const Fd file(open_regular(path, code, size));
    if (size > max_bytes) fail(code, "{}: {} bytes; expected at most {}", path.string(), size, max_bytes);
    std::string text(size, '\0');
    size_t got = 0;
    while (got < size) {
        const ssize_t n = ::read(file.fd, text.data() + got, size - got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail(refusal(code), "{}: cannot read: {}", path.string(), errno_text(errno));
        if (n == 0) break;
        got += size_t(n);
    }
    text.resize(got);
    return text;
}

void replace_file(const fs::path& path, std::string_view text) {
    const fs::path temporary = path.string() + ".tmp";
    OutFile out(temporary);
    out.write(text);
    out.close();
    rename_path(temporary, path);
    sync_directory(path.parent_path());
}

void sync_directory(const fs::path& path) {
    const fs::path dir = path.empty() ? fs::path(".") : path;
    const Fd fd(::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (fd.fd < 0 || ::fsync(fd.fd) != 0)
        fail(Exit::io, "{}: cannot fsync the directory: {}", dir.string(), errno_text(errno));
}

void make_directories(const fs::path& path) {
    std::error_code error;
    if (path.empty() || fs::is_directory(path, error)) return;
    make_directories(path.parent_path());
    fs::create_directory(path, error);
    if (error) fail(Exit::io, "{}: cannot create the directory: {}", path.string(), error.message());
    sync_directory(path.parent_path());  // a directory's files are only as durable as its name
}

void rename_path(const fs::path& from, const fs::path& to) {
    if (::rename(from.c_str(), to.c_str()) != 0)
        fail(Exit::io, "{}: cannot rename to {}: {}", from.string(), to.string(), errno_text(errno));
}

std::vector<std::string> glob_paths(const std::string& pattern) {
    glob_t found{};
    const int rc = ::glob(pattern.c_str(), GLOB_NOSORT, nullptr, &found);
    std::vector<std::string> paths;
    for (size_t i = 0; rc == 0 && i < found.gl_pathc; i++) paths.emplace_back(found.gl_pathv[i]);
    ::globfree(&found);
    if (rc != 0 && rc != GLOB_NOMATCH) fail(Exit::io, "{}: cannot list the files", pattern);
    std::sort(paths.begin(), paths.end());
    return paths;
}
