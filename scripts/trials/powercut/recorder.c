/* Records what a process does to the files below $POWERCUT_FOLDER, in order, in $POWERCUT_LOG; recording.py reads it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct head { /* then the name, then the data */
  char kind;
  uint8_t unused;
  uint16_t name;
  uint32_t data;
  int64_t offset;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* a record and its call are one: the order is that of the calls */
static const char *folder;
static size_t length;
static int sink = -1;

__attribute__((constructor)) static void begin(void) {
  const char *log = getenv("POWERCUT_LOG");
  folder = getenv("POWERCUT_FOLDER");
  if (!folder || !log) return;
  length = strlen(folder);
  sink = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (sink < 0) _exit(1);
}

/* The part of a path below the folder ("" is the folder itself); null for any other. */
static const char *below(const char *path) {
  if (sink < 0 || strncmp(path, folder, length)) return 0;
  return path[length] == '/' ? path + length + 1 : path[length] ? 0 : path + length;
}

static const char *name_of(int fd, char *room) {
  char link[64];
  if (sink < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, room, PATH_MAX - 1);
  if (size < 0) return 0;
  room[size] = 0;
  return below(room);
}

static void record(char kind, const char *name, int64_t offset, const void *data, size_t size) {
  struct head head = {kind, 0, strlen(name), size, offset};
  struct iovec parts[3] = {{&head, sizeof head}, {(void *)name, head.name}, {(void *)data, size}};
  if (syscall(SYS_writev, sink, parts, 3) != (ssize_t)(sizeof head + head.name + size)) _exit(1);
}

/* Makes the call, and records it if it succeeds. */
#define RECORDED(type, failed, name, call, kind, offset, data, size) \
  do { \
    const char *recorded = name; \
    if (recorded) pthread_mutex_lock(&lock); \
    type result = call; \
    if (recorded && result != failed) record(kind, recorded, offset, data, size); \
    if (recorded) pthread_mutex_unlock(&lock); \
    return result; \
  } while (0)

static int opened(int at, const char *path, int flags, mode_t mode) {
  char room[PATH_MAX];
  int fresh = flags & O_CREAT && syscall(SYS_faccessat, at, path, F_OK) < 0;
  pthread_mutex_lock(&lock);
  int fd = syscall(SYS_openat, at, path, flags, mode);
  const char *name = fd < 0 ? 0 : name_of(fd, room);
  if (name && fresh) record('c', name, 0, 0, 0);
  if (name && flags & O_TRUNC && !fresh) record('t', name, 0, 0, 0);
  pthread_mutex_unlock(&lock);
  return fd;
}

#define MODE(flags, mode) \
  va_list more; \
  va_start(more, flags); \
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
  va_end(more)

int open(const char *path, int flags, ...) { MODE(flags, mode); return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode); return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags, mode); return opened(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags, mode); return opened(at, path, flags | O_LARGEFILE, mode); }

static ssize_t put(int fd, const void *data, size_t size, off_t offset) {
  char room[PATH_MAX];
  RECORDED(ssize_t, -1, name_of(fd, room), syscall(SYS_pwrite64, fd, data, size, offset), 'w', offset, data, (size_t)result);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return put(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return put(fd, data, size, offset); }

ssize_t write(int fd, const void *data, size_t size) {
  char room[PATH_MAX];
  RECORDED(ssize_t, -1, name_of(fd, room), syscall(SYS_write, fd, data, size), 'w',
           syscall(SYS_lseek, fd, 0, SEEK_CUR) - result, data, (size_t)result);
}

static int cut(int fd, off_t size) {
  char room[PATH_MAX];
  RECORDED(int, -1, name_of(fd, room), syscall(SYS_ftruncate, fd, size), 't', size, 0, 0);
}
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size); }

static int synced(int fd, long call) {
  char room[PATH_MAX];
  RECORDED(int, -1, name_of(fd, room), syscall(call, fd), 's', 0, 0, 0);
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

int unlink(const char *path) { RECORDED(int, -1, below(path), syscall(SYS_unlinkat, AT_FDCWD, path, 0), 'u', 0, 0, 0); }
int mkdir(const char *path, mode_t mode) { RECORDED(int, -1, below(path), syscall(SYS_mkdirat, AT_FDCWD, path, mode), 'm', 0, 0, 0); }
int rename(const char *old, const char *new) {
  const char *to = below(new);
  RECORDED(int, -1, to ? below(old) : 0, syscall(SYS_renameat2, AT_FDCWD, old, AT_FDCWD, new, 0), 'r', 0, to, strlen(to));
}

/* These write without passing the data by here; who uses them falls back to read and write. */
ssize_t sendfile(int out, int in, off_t *offset, size_t size) { errno = ENOSYS; return -1; }
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) { errno = ENOSYS; return -1; }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) { errno = ENOSYS; return -1; }
