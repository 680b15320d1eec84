/* Preloaded into a VM, it has the system refuse what UDP sockets ask, as the file $REFUSE says:
 *   recv ERRNO COUNT, send ERRNO COUNT   so many calls fail
 *   gso ERRNO                            sends of several datagrams at once fail
 *   deny ERRNO                           all sends fail
 *   close                                the next send finds its descriptor closed,
 *   other                                ... or of another file,
 *   taken                                ... and its port kept from it, too
 * A file that asks for a number of calls, or for a descriptor, is removed when it is obeyed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char what[8];
static int code, left;

static int is_udp(int fd) {
    int type = 0, domain = 0;
    socklen_t len = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) || type != SOCK_DGRAM) return 0;
    len = sizeof domain;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len)) return 0;
    return domain == AF_INET || domain == AF_INET6;
}

static int is_batch(const struct msghdr *m) {
    struct msghdr *h = (struct msghdr *)m;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c))
        if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_SEGMENT) return 1;
    return 0;
}

/* The errno a call fails with, or 0. */
static int refused(const char *call, int fd, const struct msghdr *m) {
    const char *path = getenv("REFUSE");
    int result = 0, sends = !strcmp(call, "send");
    if (!path || !is_udp(fd)) return 0;
    pthread_mutex_lock(&lock);
    if (left == 0) {
        FILE *f = fopen(path, "r");
        if (f) {
            int n = fscanf(f, "%7s %d %d", what, &code, &left);
            fclose(f);
            if (n == 2 && !strcmp(what, "gso")) {
                if (sends && is_batch(m)) result = code;
            } else if (n == 2 && !strcmp(what, "deny")) {
                if (sends) result = code;
            } else if (n == 1 && sends) {
                int null = open("/dev/null", O_RDWR);
                unlink(path);
                if (!strcmp(what, "taken") && dup(fd) < 0) abort();
                if (!strcmp(what, "close")) close(fd);
                else dup2(null, fd);
                close(null);
            } else if (n == 3) {
                unlink(path);
            }
            if (n != 3) left = 0;
        }
    }
    if (left > 0 && !strcmp(what, call)) {
        left--;
        result = code;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

ssize_t sendmsg(int fd, const struct msghdr *m, int flags) {
    static ssize_t (*real)(int, const struct msghdr *, int);
    if (!real) real = dlsym(RTLD_NEXT, "sendmsg");
    int e = refused("send", fd, m);
    if (e) { errno = e; return -1; }
    return real(fd, m, flags);
}

ssize_t recvmsg(int fd, struct msghdr *m, int flags) {
    static ssize_t (*real)(int, struct msghdr *, int);
    if (!real) real = dlsym(RTLD_NEXT, "recvmsg");
    int e = flags & MSG_ERRQUEUE ? 0 : refused("recv", fd, 0);
    if (e) { errno = e; return -1; }
    return real(fd, m, flags);
}

int recvmmsg(int fd, struct mmsghdr *m, unsigned n, int flags, struct timespec *t) {
    static int (*real)(int, struct mmsghdr *, unsigned, int, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "recvmmsg");
    int e = flags & MSG_ERRQUEUE ? 0 : refused("recv", fd, 0);
    if (e) { errno = e; return -1; }
    return real(fd, m, n, flags, t);
}
