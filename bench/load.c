/* The benchmark's server and clients; numbers leave as one JSON object a line on stdout.
 *
 *   load serve ADDRESS                                       until stdin ends; a line on stdin asks for the figures since the last one
 *   load bulk TO FROM FROMS download|upload STREAMS SECONDS
 *   load connections TO FROM FROMS LOOPS SECONDS             connect, send 64 B, read 64 B and the server's FIN, close; again
 *   load requests TO FROM FROMS CONNECTIONS SECONDS          64 B there, 64 B back, on connections that stay
 *   load idle TO FROM FROMS CONNECTIONS                      each has had one request; they stay until stdin ends
 *   load push TO FROM FROMS STALL_SECONDS LIMIT_MIB          at a server that accepts and never reads
 *
 * TO is the server's address; the client's are the FROMS addresses that begin with FROM, in turn. Every client begins with
 * a message of 64 B that holds its own address and port, so the server can tell whether a proxy between them kept these. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MESSAGE = 64,
    CHUNK = 256 * 1024,     /* a read or write in bulk */
    SAMPLES = 4 * 1000 * 1000,
    FILES = 1 << 20,        /* the highest descriptor that is looked after */
    BATCH = 256,
};
enum { ANSWER = 8001, CLOSE, SINK, SOURCE, IGNORE, PORTS };  /* the server's ports; [capture] has 8001-8009 */

static char chunk[CHUNK];
static int loop;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void watch(int fd, uint32_t events, int operation) {
    struct epoll_event event = {events, {.fd = fd}};
    if (epoll_ctl(loop, operation, fd, &event)) fail("epoll_ctl");
}

/* ---- server ---- */

static struct seen {        /* by descriptor */
    struct sockaddr_in peer;
    int port, greeted;
    uint64_t bytes;
} *seen;
static uint64_t accepted, same_address, same_port, other_address, total;
static int ignored[BATCH], ignoring;  /* connections that are never read: closed with the next figures, which begin another cell */

static void check_greeting(struct seen *s, const char *message) {
    struct sockaddr_in told = {0};
    memcpy(&told.sin_addr, message, 4), memcpy(&told.sin_port, message + 4, 2);
    s->greeted = 1;
    if (told.sin_addr.s_addr != s->peer.sin_addr.s_addr) other_address++;
    else if (told.sin_port != s->peer.sin_port) same_address++;
    else same_address++, same_port++;
}

static void serve_connection(int fd, uint32_t events) {
    struct seen *s = &seen[fd];
    if (s->port == SOURCE && s->greeted && events & EPOLLOUT) {
        ssize_t sent = send(fd, chunk, CHUNK, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) close(fd);
        return;
    }
    ssize_t got = recv(fd, chunk, s->port == SINK ? CHUNK : MESSAGE, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        if (got == 0 && s->port == SINK) send(fd, &s->bytes, sizeof s->bytes, MSG_NOSIGNAL);
        close(fd);
        return;
    }
    if (!s->greeted && got >= 6) check_greeting(s, chunk);
    s->bytes += got, total += got;
    if (s->port == ANSWER || s->port == CLOSE) send(fd, chunk, got, MSG_NOSIGNAL);
    if (s->port == CLOSE) close(fd);
    if (s->port == SOURCE) watch(fd, EPOLLOUT, EPOLL_CTL_MOD);
}

static void accept_all(int listener, int port) {
    for (;;) {
        struct sockaddr_in peer;
        socklen_t size = sizeof peer;
        int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        accepted++;
        seen[fd] = (struct seen){.peer = peer, .port = port};
        if (port != IGNORE) watch(fd, EPOLLIN, EPOLL_CTL_ADD);
        else if (ignoring < BATCH) ignored[ignoring++] = fd;
    }
}

static void tell_figures(void) {
    char line[256];
    ssize_t got = read(0, line, sizeof line);
    if (got <= 0) exit(0);
    while (ignoring) close(ignored[--ignoring]);
    printf("{\"accepted\": %lu, \"same_address\": %lu, \"same_port\": %lu, \"other_address\": %lu, \"bytes\": %lu}\n",
           accepted, same_address, same_port, other_address, total);
    fflush(stdout);
    accepted = same_address = same_port = other_address = total = 0;
}

static void serve(const char *address) {
    static const int on = 1;
    int listeners[PORTS - ANSWER];
    seen = calloc(FILES, sizeof *seen);  /* touched where it is used */
    for (int port = ANSWER; port < PORTS; port++) {
        struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        inet_pton(AF_INET, address, &at.sin_addr);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4096)) fail("listen");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        listeners[port - ANSWER] = fd;
        watch(fd, EPOLLIN, EPOLL_CTL_ADD);
    }
    watch(0, EPOLLIN, EPOLL_CTL_ADD);
    puts("{\"serving\": true}");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[BATCH];
        int ready = epoll_wait(loop, events, BATCH, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == 0) tell_figures();
            else if (fd <= listeners[PORTS - 1 - ANSWER]) accept_all(fd, ANSWER + fd - listeners[0]);
            else serve_connection(fd, events[i].events);
        }
    }
}

/* ---- clients ---- */

static struct sockaddr_in to, from;
static uint32_t froms, opened, failed;
static uint32_t *samples;   /* ns */
static uint64_t sampled;

/* A socket bound to the next of the client's addresses; the port is chosen by connect, so all of them serve every address. */
static int new_socket(int flags) {
    static const int on = 1;
    struct sockaddr_in source = from;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0) fail("socket");
    source.sin_addr.s_addr = htonl(ntohl(from.sin_addr.s_addr) + opened++ % froms);
    setsockopt(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&source, sizeof source)) fail("bind");
    return fd;
}

static void write_greeting(int fd, char message[MESSAGE]) {
    struct sockaddr_in own;
    socklen_t size = sizeof own;
    getsockname(fd, (struct sockaddr *)&own, &size);
    memset(message, 'x', MESSAGE);
    memcpy(message, &own.sin_addr, 4), memcpy(message + 4, &own.sin_port, 2);
}

static int greet(int fd) {
    char message[MESSAGE];
    write_greeting(fd, message);
    return send(fd, message, MESSAGE, MSG_NOSIGNAL) == MESSAGE;
}

/* A connection whose server has the greeting, and has answered it if it answers at all; -1 if it did not work. */
static int open_one(int port) {
    static const struct timeval patience = {.tv_sec = 5};
    char answer[MESSAGE];
    int fd = new_socket(0);
    to.sin_port = htons(port);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) || !greet(fd) ||
        (port == ANSWER && recv(fd, answer, MESSAGE, MSG_WAITALL) != MESSAGE)) {
        failed++;
        close(fd);
        return -1;
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static void sample(double seconds) {
    if (sampled < SAMPLES) samples[sampled++] = seconds < 4 ? seconds * 1e9 : 4000000000u;
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile(double share) {
    return sampled ? samples[(uint64_t)(share * (sampled - 1))] / 1e3 : 0;
}

static void report(double seconds, uint64_t count, uint64_t bytes) {
    if (sampled) qsort(samples, sampled, sizeof *samples, by_size);
    printf("{\"seconds\": %.6f, \"opened\": %u, \"failed\": %u, \"count\": %lu, \"bytes\": %lu, "
           "\"p50_us\": %.1f, \"p90_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f}\n",
           seconds, opened, failed, count, bytes, percentile(.5), percentile(.9), percentile(.99), percentile(1));
}

/* Counted where they arrive: downloads here; for an upload the server says what it got, once it has all of it. */
static void bulk(int upload, int streams, double seconds) {
    uint64_t bytes = 0;
    int open = 0;
    double start = now(), stop = start + seconds;
    for (int i = 0; i < streams; i++) {
        int fd = open_one(upload ? SINK : SOURCE);
        if (fd >= 0) watch(fd, upload ? EPOLLOUT : EPOLLIN, EPOLL_CTL_ADD), open++;
    }
    while (open && now() < stop + 5) {
        struct epoll_event events[BATCH];
        int ready = epoll_wait(loop, events, BATCH, 100);
        int over = now() >= stop;
        if (over && !upload) break;
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            ssize_t done;
            if (!upload) {
                done = recv(fd, chunk, CHUNK, 0);
                if (done > 0) bytes += done;
            } else if (events[i].events & EPOLLIN) {
                uint64_t got = 0;
                done = recv(fd, &got, sizeof got, MSG_WAITALL) == sizeof got ? 0 : -1;
                bytes += got, errno = 0;
                if (done == 0) { close(fd), open--; continue; }
            } else if (over) {
                shutdown(fd, SHUT_WR);
                watch(fd, EPOLLIN, EPOLL_CTL_MOD);
                continue;
            } else {
                done = send(fd, chunk, CHUNK, MSG_NOSIGNAL);
            }
            if (done == 0 || (done < 0 && errno != EAGAIN)) failed++, close(fd), open--;
        }
    }
    if (upload) failed += open;
    report(now() - start, streams, bytes);
}

static struct loop_state { double start; int sent; } *loops;  /* by descriptor */

static void start_connection(void) {
    int fd = new_socket(SOCK_NONBLOCK);
    if (fd >= FILES) fail("too many files");
    loops[fd] = (struct loop_state){now(), 0};
    to.sin_port = htons(CLOSE);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) fail("connect");
    watch(fd, EPOLLIN | EPOLLOUT | EPOLLET, EPOLL_CTL_ADD);
}

/* The server closes first: the TIME_WAIT state is on its side of every connection, so the client has its ports back at once. */
static void connections(int wanted, double seconds) {
    double start = now(), stop = start + seconds;
    uint64_t count = 0;
    int open = 0;
    loops = calloc(FILES, sizeof *loops);
    for (; open < wanted; open++) start_connection();
    while (open && now() < stop + 5) {
        struct epoll_event events[BATCH];
        int ready = epoll_wait(loop, events, BATCH, 100);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd, bad = 0;
            struct loop_state *state = &loops[fd];
            if (!state->sent && events[i].events & (EPOLLOUT | EPOLLERR)) state->sent = 1, bad = !greet(fd);
            ssize_t got = bad ? -1 : 1;
            while (got > 0) got = recv(fd, chunk, MESSAGE, 0), state->sent += got > 0 ? got : 0;
            if (got < 0 && !bad && errno == EAGAIN) continue;
            double end = now();
            if (got < 0 || state->sent != 1 + MESSAGE) failed++;
            else if (end <= stop) count++, sample(end - state->start);
            close(fd);
            if (end < stop) start_connection();
            else open--;
        }
    }
    failed += open;
    report(seconds, count, count * 2 * MESSAGE);
}

static void requests(int wanted, double seconds) {
    char message[MESSAGE];
    uint64_t count = 0;
    int *fds = calloc(wanted, sizeof *fds), open = 0;
    double *sent_at = calloc(FILES, sizeof *sent_at);
    for (int i = 0; i < wanted; i++)
        if ((fds[open] = open_one(ANSWER)) >= 0) watch(fds[open++], EPOLLIN | EPOLLET, EPOLL_CTL_ADD);
    memset(message, 'x', MESSAGE);
    double start = now(), stop = start + seconds;
    for (int i = 0; i < open; i++) sent_at[fds[i]] = now(), send(fds[i], message, MESSAGE, MSG_NOSIGNAL);
    while (open && now() < stop) {
        struct epoll_event events[BATCH];
        int ready = epoll_wait(loop, events, BATCH, 100);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            ssize_t got = recv(fd, chunk, MESSAGE, 0);
            if (got < 0 && errno == EAGAIN) continue;
            if (got != MESSAGE) { failed++, open--, close(fd); continue; }  /* 64 B are never parted on these links */
            double end = now();
            sample(end - sent_at[fd]), count++;
            sent_at[fd] = end;
            if (send(fd, message, MESSAGE, MSG_NOSIGNAL) != MESSAGE) failed++, open--, close(fd);
        }
    }
    report(now() - start, count, count * 2 * MESSAGE);
}

static void idle(int wanted) {
    char line[16];
    for (int i = 0; i < wanted; i++) open_one(ANSWER);
    report(0, wanted - failed, 0);
    fflush(stdout);
    while (read(0, line, sizeof line) > 0);
}

static void push(double stall, uint64_t limit) {
    uint64_t bytes = MESSAGE;
    int fd = open_one(IGNORE);
    double start = now();
    while (fd >= 0 && bytes < limit) {
        struct pollfd ready = {fd, POLLOUT, 0};
        if (poll(&ready, 1, stall * 1000) == 0) break;
        ssize_t sent = send(fd, chunk, CHUNK, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) { failed++; break; }
        if (sent > 0) bytes += sent;
    }
    report(now() - start, 1, bytes);
}

int main(int count, char **words) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    loop = epoll_create1(EPOLL_CLOEXEC);
    samples = malloc(SAMPLES * sizeof *samples);
    const char *mode = count > 2 ? words[1] : "";
    if (!strcmp(mode, "serve")) serve(words[2]);
    if (count < 6 || inet_pton(AF_INET, words[2], &to.sin_addr) != 1 || inet_pton(AF_INET, words[3], &from.sin_addr) != 1) {
        fputs("load: wrong words; they are told at the top of load.c\n", stderr);
        return 64;
    }
    to.sin_family = from.sin_family = AF_INET;
    froms = atoi(words[4]);
    double last = atof(words[count - 1]);
    if (!strcmp(mode, "bulk") && count == 8) bulk(!strcmp(words[5], "upload"), atoi(words[6]), last);
    else if (!strcmp(mode, "connections") && count == 7) connections(atoi(words[5]), last);
    else if (!strcmp(mode, "requests") && count == 7) requests(atoi(words[5]), last);
    else if (!strcmp(mode, "idle")) idle(last);
    else if (!strcmp(mode, "push") && count == 7) push(atof(words[5]), last * (1 << 20));
    else return 64;
    return 0;
}
