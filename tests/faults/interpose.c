/* A layer between a process and its file system, loaded with LD_PRELOAD. It counts the operations that change what lies
   below one folder; before the n-th it kills the process, or lets it and those after it fail; and it writes down what a
   disk would know after each of them, so that a power cut can be played afterwards (powercut.py).

   Below another folder, files that child processes open to read can fail, or end the child (faults_arm_reads).

   Nothing happens before faults_arm(). Only what goes through libc is seen: Python, PyTorch and safetensors do. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long number, target;  /* operations so far; the one at which something happens, from 1, 0 for never */
static int failure, lasting; /* errno, 0 for a kill; whether later operations fail too */
static int record = -1;      /* descriptor of the record, -1 for none */
static char read_root[PATH_MAX];
static long reads, read_target; /* files that this child has opened; the one at which something happens */
static int read_failure;        /* errno, 0 for a kill */
static pid_t parent;            /* who armed the reads, and is spared */

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

void faults_arm(const char *folder, long at, int error, int from_then_on, const char *record_path) {
  int (*real_open)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
  record = *record_path ? real_open(record_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644) : -1;
  strncpy(root, folder, sizeof root - 1);
  number = 0, target = at, failure = error, lasting = from_then_on;
}

long faults_count(void) { return number; }

void faults_arm_reads(const char *folder, long at, int error) {
  strncpy(read_root, folder, sizeof read_root - 1);
  reads = 0, read_target = at, read_failure = error, parent = getpid();
}

static int below_root(const char *root, int folder, const char *path, char *whole) {
  if (!*root || !path) return 0;
  if (path[0] == '/') snprintf(whole, PATH_MAX, "%s", path);
  else {
    char place[PATH_MAX] = "";
    if (folder == AT_FDCWD) { if (!getcwd(place, sizeof place)) return 0; }
    else {
      char link[64];
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      ssize_t size = readlink(link, place, sizeof place - 1);
      if (size < 0) return 0;
      place[size] = 0;
    }
    snprintf(whole, PATH_MAX, "%.*s/%s", PATH_MAX / 2, place, path);
  }
  size_t size = strlen(root);
  return !strncmp(whole, root, size) && (whole[size] == '/' || !whole[size]);
}

static int below(int folder, const char *path, char *whole) { return below_root(root, folder, path, whole); }

/* A child is about to read a file: kill it, or give an errno. */
static int unreadable(int folder, const char *path) {
  char whole[PATH_MAX];
  if (!read_target || getpid() == parent || !below_root(read_root, folder, path, whole)) return 0;
  if (++reads != read_target) return 0;
  if (!read_failure) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  return read_failure;
}

static int below_fd(int fd, char *whole) {
  char link[64];
  if (!*root || fd == record) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, whole, PATH_MAX - 1);
  if (size < 0) return 0;
  whole[size] = 0;
  size = strlen(root);
  return !strncmp(whole, root, size) && (whole[size] == '/' || !whole[size]);
}

/* One operation is about to happen: kill, or give an errno. */
static int faulty(void) {
  number++;
  if (!target || number < target || (number > target && !lasting)) return 0;
  if (!failure) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  return failure;
}

#define FAULT(result) do { int error_ = faulty(); if (error_) { errno = error_; return result; } } while (0)

static void put(const void *data, size_t size) {
  ssize_t (*real)(int, const void *, size_t) = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
  const char *rest = data;
  while (size) {
    ssize_t done = real(record, rest, size);
    if (done <= 0) abort();
    rest += done, size -= done;
  }
}

/* kind, number of the operation, inode, two paths, bytes; each text and the bytes with their size before them */
static void note(char kind, uint64_t inode, const char *a, const char *b, const void *data, uint64_t size) {
  if (record < 0) return;
  int before = errno;
  uint64_t head[5] = {number, inode, a ? strlen(a) : 0, b ? strlen(b) : 0, size};
  put(&kind, 1), put(head, sizeof head);
  if (a) put(a, head[2]);
  if (b) put(b, head[3]);
  if (size) put(data, size);
  errno = before;
}

static uint64_t inode_of(const char *path) {
  struct stat about;
  return lstat(path, &about) ? 0 : about.st_ino;
}

static uint64_t inode_of_fd(int fd) {
  struct stat about;
  return fstat(fd, &about) ? 0 : about.st_ino;
}

static int open_any(int (*real)(int, const char *, int, mode_t), int folder, const char *path, int flags, mode_t mode) {
  char whole[PATH_MAX];
  struct stat about;
  int writes = (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && below(folder, path, whole);
  if (!writes) {
    int error = unreadable(folder, path);
    if (error) { errno = error; return -1; }
    return real(folder, path, flags, mode);
  }
  FAULT(-1);
  int missing = lstat(whole, &about) != 0;
  int fd = real(folder, path, flags, mode);
  if (fd >= 0 && missing) note('c', inode_of_fd(fd), whole, NULL, NULL, 0);
  return fd;
}

static int real_openat(int folder, const char *path, int flags, mode_t mode) {
  REAL(int, "openat", int, const char *, int, ...);
  return real(folder, path, flags, mode);
}

#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { MODE(flags); return open_any(real_openat, AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags); return open_any(real_openat, AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags); return open_any(real_openat, folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags); return open_any(real_openat, folder, path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode) { return open_any(real_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static FILE *fopen_any(const char *name, const char *path, const char *mode) {
  FILE *(*real)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, name);
  char whole[PATH_MAX];
  struct stat about;
  if (mode[0] == 'r' && !strchr(mode, '+')) return real(path, mode);
  if (!below(AT_FDCWD, path, whole)) return real(path, mode);
  FAULT(NULL);
  int missing = lstat(whole, &about) != 0;
  FILE *file = real(path, mode);
  if (file && missing) note('c', inode_of_fd(fileno(file)), whole, NULL, NULL, 0);
  return file;
}
FILE *fopen(const char *path, const char *mode) { return fopen_any("fopen", path, mode); }
FILE *fopen64(const char *path, const char *mode) { return fopen_any("fopen64", path, mode); }

#define BY_FD(fd, result) do { char whole_[PATH_MAX]; if (below_fd(fd, whole_)) FAULT(result); } while (0)

ssize_t write(int fd, const void *data, size_t size) { REAL(ssize_t, "write", int, const void *, size_t); BY_FD(fd, -1); return real(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(ssize_t, "pwrite", int, const void *, size_t, off_t); BY_FD(fd, -1); return real(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t); BY_FD(fd, -1); return real(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *parts, int count) { REAL(ssize_t, "writev", int, const struct iovec *, int); BY_FD(fd, -1); return real(fd, parts, count); }
ssize_t sendfile(int out, int in, off_t *at, size_t size) { REAL(ssize_t, "sendfile", int, int, off_t *, size_t); BY_FD(out, -1); return real(out, in, at, size); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) { REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t); BY_FD(out, -1); return real(out, in, at, size); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) { REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned); BY_FD(out, -1); return real(in, from, out, to, size, flags); }
int ftruncate(int fd, off_t size) { REAL(int, "ftruncate", int, off_t); BY_FD(fd, -1); return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(int, "ftruncate64", int, off64_t); BY_FD(fd, -1); return real(fd, size); }

static int sync_any(const char *name, int fd) {
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
  char whole[PATH_MAX];
  if (!below_fd(fd, whole)) return real(fd);
  FAULT(-1);
  int done = real(fd);
  struct stat about;
  if (!done && record >= 0 && !fstat(fd, &about)) {
    if (S_ISDIR(about.st_mode)) note('d', about.st_ino, whole, NULL, NULL, 0);
    else { /* the bytes that are on the disk from now on */
      char *data = malloc(about.st_size + 1);
      REAL(int, "openat", int, const char *, int, ...);
      int again = real(AT_FDCWD, whole, O_RDONLY | O_CLOEXEC);
      ssize_t size = again < 0 ? 0 : pread(again, data, about.st_size, 0);
      if (again >= 0) close(again);
      note('f', about.st_ino, whole, NULL, data, size < 0 ? 0 : size);
      free(data);
    }
  }
  return done;
}
int fsync(int fd) { return sync_any("fsync", fd); }
int fdatasync(int fd) { return sync_any("fdatasync", fd); }

static int moved(const char *name, int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
  char a[PATH_MAX], b[PATH_MAX];
  int counts = below(to_folder, to, b) | below(from_folder, from, a);
  if (counts) FAULT(-1);
  int done;
  if (!strcmp(name, "link")) {
    REAL(int, "link", const char *, const char *);
    done = real(from, to);
  } else {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    done = real(from_folder, from, to_folder, to, flags);
  }
  if (!done && counts) note(!strcmp(name, "link") ? 'l' : 'r', inode_of(b), a, b, NULL, 0);
  return done;
}
int rename(const char *from, const char *to) { return moved("rename", AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int f, const char *from, int t, const char *to) { return moved("rename", f, from, t, to, 0); }
int renameat2(int f, const char *from, int t, const char *to, unsigned flags) { return moved("rename", f, from, t, to, flags); }
int link(const char *from, const char *to) { return moved("link", AT_FDCWD, from, AT_FDCWD, to, 0); }

static int removed(int folder, const char *path, int flags) {
  REAL(int, "unlinkat", int, const char *, int);
  char whole[PATH_MAX];
  if (!below(folder, path, whole)) return real(folder, path, flags);
  FAULT(-1);
  int done = real(folder, path, flags);
  if (!done) note('u', 0, whole, NULL, NULL, 0);
  return done;
}
int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int folder, const char *path, int flags) { return removed(folder, path, flags); }

static int made(int folder, const char *path, mode_t mode) {
  REAL(int, "mkdirat", int, const char *, mode_t);
  char whole[PATH_MAX];
  if (!below(folder, path, whole)) return real(folder, path, mode);
  FAULT(-1);
  int done = real(folder, path, mode);
  if (!done) note('m', inode_of(whole), whole, NULL, NULL, 0);
  return done;
}
int mkdir(const char *path, mode_t mode) { return made(AT_FDCWD, path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { return made(folder, path, mode); }

int symlink(const char *target_path, const char *path) {
  REAL(int, "symlink", const char *, const char *);
  char whole[PATH_MAX];
  if (!below(AT_FDCWD, path, whole)) return real(target_path, path);
  FAULT(-1);
  int done = real(target_path, path);
  if (!done) note('s', inode_of(whole), whole, target_path, NULL, 0);
  return done;
}
