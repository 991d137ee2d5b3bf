/* LD_PRELOAD shim: stops or fails the n-th system call that changes something under one directory;
 * keeps a rank in MPI_Finalize.
 *
 *   KILN_FAULT_UNDER=DIR    calls on paths, and on files opened, below DIR are counted from 1
 *   KILN_FAULT_LOG=FILE     "n call path" of every counted call
 *   KILN_FAULT_AT=N         the call at which it happens
 *   KILN_FAULT_DO           kill     half of a write is done, then SIGKILL
 *                           power    the same, and what was not fsynced is lost: unsynced tails of files, and the
 *                                    renames and new directories whose parent was not fsynced
 *                           EIO or ENOSPC   half of a write is done, then the error; other calls fail at once
 *
 *   KILN_FAULT_FINALIZE=R   MPI_Finalize of rank R never returns
 *
 * One thread at a time is assumed: kiln writes from its main thread. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
enum { MAX = 256 };

/* Files written: a second descriptor (which survives close and rename) and how many bytes are safe. */
static struct { int copy; dev_t dev; ino_t ino; off_t synced; } files[MAX];
/* Names made and not yet safe; `from` is empty for a new directory. */
static struct { char parent[PATH_MAX], from[PATH_MAX], to[PATH_MAX]; } names[MAX];
static int n_files, n_names, n_calls;

static const char* setting(const char* name) {
    const char* value = getenv(name);
    return value ? value : "";
}

static int watched(const char* path) {
    const char* under = setting("KILN_FAULT_UNDER");
    return *under && !strncmp(path, under, strlen(under));
}

static const char* path_of(int fd) {
    static char path[PATH_MAX];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    return path;
}

static void parent_of(const char* path, char* parent) {
    snprintf(parent, PATH_MAX, "%s", path);
    char* slash = strrchr(parent, '/');
    if (slash) *slash = 0;
}

static void lose_power(void) {
    for (int i = n_names - 1; i >= 0; i--) {
        char lost[PATH_MAX + 8];
        snprintf(lost, sizeof lost, "%s.lost", names[i].to);
        REAL(rename)(names[i].to, *names[i].from ? names[i].from : lost);
    }
    for (int i = 0; i < n_files; i++) {
        struct stat s;
        const int longer = !fstat(files[i].copy, &s) && s.st_size > files[i].synced;
        if (longer && ftruncate(files[i].copy, files[i].synced)) abort();
    }
}

/* Counts a call.  Nonzero: it must fail with this errno. */
static int fault(const char* call, const char* path, int fd, const void* data, size_t n) {
    if (!watched(path)) return 0;
    n_calls++;
    const char* log = setting("KILN_FAULT_LOG");
    if (*log) {
        FILE* f = fopen(log, "a");
        if (!f || fprintf(f, "%d %s %s\n", n_calls, call, path) < 0 || fclose(f)) abort();
    }
    if (n_calls != atoi(setting("KILN_FAULT_AT"))) return 0;
    const char* what = setting("KILN_FAULT_DO");
    if (data && REAL(write)(fd, data, n / 2) < 0) abort();
    if (!strcmp(what, "power")) lose_power();
    if (!strcmp(what, "power") || !strcmp(what, "kill")) kill(getpid(), SIGKILL);
    return !strcmp(what, "ENOSPC") ? ENOSPC : EIO;
}

static int denied(const char* call, const char* path) {
    const int error = fault(call, path, -1, NULL, 0);
    if (error) errno = error;
    return error;
}

static int file_index(int fd) {
    struct stat s;
    if (fstat(fd, &s)) return -1;
    for (int i = 0; i < n_files; i++)
        if (files[i].dev == s.st_dev && files[i].ino == s.st_ino) return i;
    return -1;
}

static void watch_file(int fd) {
    struct stat s;
    if (fstat(fd, &s) || file_index(fd) >= 0) return;
    if (n_files == MAX) abort();
    files[n_files].copy = fcntl(fd, F_DUPFD_CLOEXEC, 500);
    files[n_files].dev = s.st_dev;
    files[n_files].ino = s.st_ino;
    files[n_files++].synced = s.st_size; /* of an earlier process: on disk by now */
}

static void add_name(const char* from, const char* to) {
    if (n_names == MAX) abort();
    parent_of(to, names[n_names].parent);
    snprintf(names[n_names].from, PATH_MAX, "%s", from);
    snprintf(names[n_names++].to, PATH_MAX, "%s", to);
}

static int opened(const char* call, __typeof__(&open) real, const char* path, int flags, mode_t mode) {
    const int writing = (flags & O_ACCMODE) != O_RDONLY;
    if (writing && denied(call, path)) return -1;
    const int fd = real(path, flags, mode);
    if (fd >= 0 && writing && watched(path)) watch_file(fd);
    return fd;
}

static mode_t mode_of(int flags, va_list list) { return flags & O_CREAT ? va_arg(list, mode_t) : 0; }

int open(const char* path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    const mode_t mode = mode_of(flags, list);
    va_end(list);
    return opened("open", REAL(open), path, flags, mode);
}

int open64(const char* path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    const mode_t mode = mode_of(flags, list);
    va_end(list);
    return opened("open", REAL(open64), path, flags, mode);
}

ssize_t write(int fd, const void* data, size_t n) {
    const int error = fault("write", path_of(fd), fd, data, n);
    if (error) return errno = error, -1;
    return REAL(write)(fd, data, n);
}

int fsync(int fd) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", path_of(fd));
    if (denied("fsync", path)) return -1;
    struct stat s;
    if (fstat(fd, &s)) return REAL(fsync)(fd);
    const int file = file_index(fd);
    if (file >= 0) files[file].synced = s.st_size;
    for (int i = n_names - 1; S_ISDIR(s.st_mode) && i >= 0; i--)
        if (!strcmp(names[i].parent, path)) memmove(&names[i], &names[i + 1], (size_t)(--n_names - i) * sizeof names[0]);
    return REAL(fsync)(fd);
}

int rename(const char* from, const char* to) {
    if (denied("rename", to)) return -1;
    struct stat s;
    const int replaces = !lstat(to, &s); /* both the old and the new file are good then: nothing to undo */
    const int rc = REAL(rename)(from, to);
    if (!rc && watched(to) && !replaces) add_name(from, to);
    return rc;
}

int mkdir(const char* path, mode_t mode) {
    if (denied("mkdir", path)) return -1;
    const int rc = REAL(mkdir)(path, mode);
    if (!rc && watched(path)) add_name("", path);
    return rc;
}

int symlink(const char* target, const char* path) { return denied("symlink", path) ? -1 : REAL(symlink)(target, path); }
int unlink(const char* path) { return denied("unlink", path) ? -1 : REAL(unlink)(path); }
int rmdir(const char* path) { return denied("rmdir", path) ? -1 : REAL(rmdir)(path); }

int unlinkat(int dir, const char* path, int flags) {
    char full[2 * PATH_MAX];
    snprintf(full, sizeof full, "%s%s%s", *path == '/' ? "" : path_of(dir), *path == '/' ? "" : "/", path);
    return denied("unlink", full) ? -1 : REAL(unlinkat)(dir, path, flags);
}

int MPI_Finalize(void) {
    while (*setting("KILN_FAULT_FINALIZE") && !strcmp(setting("KILN_FAULT_FINALIZE"), setting("PMI_RANK"))) pause();
    return REAL(MPI_Finalize)();
}
