/* A minimal transparent relay in C: what is possible in user space with one thread, epoll and splice.
 *
 * usage: splice_relay ADDRESS PORT        prints "ready" and runs until it is killed
 *
 * It listens transparently, dials the original destination from the client's own address and port, and copies both ways.
 * Every descriptor is registered once, edge-triggered; every event runs both directions of its connection until the kernel
 * says EAGAIN. Small reads go through a buffer on the stack. A read that fills it switches the direction to splice, and
 * what could not be sent yet waits in the same pipe, so nothing but pipes holds data; they come from a pool and go back
 * when they are empty, so an idle connection has none. One end of file is passed on as such, an error as a reset. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    SMALL = 16 * 1024,      /* as HAProxy's and nginx's buffers: what is read at once before a direction is taken for bulk */
    PIPE = 256 * 1024,      /* a pipe's size in splice mode */
    TURNS = 16,             /* so many reads, then the other connections have their turn */
    POOL = 256,             /* empty pipes kept for later */
    BATCH = 256,            /* events at once */
};

struct pipe { int in, out; size_t held; };

struct way {                /* one direction */
    struct pipe *pipe;      /* NULL: nothing is held */
    int from, to;
    int bulk, ended, shut;  /* splice; end of file was read; and was passed on */
};

struct connection;
struct end { struct connection *owner; };

struct connection {
    struct end client, server;
    struct way up, down;
    struct connection *next; /* in `again` or `dead` */
    char connecting, waiting, is_dead;
};

static struct connection *again, *dead;
static struct pipe *pool[POOL];
static int pooled, loop;

static struct pipe *take_pipe(void) {
    if (pooled) return pool[--pooled];
    struct pipe *pipe = calloc(1, sizeof *pipe);
    int ends[2];
    if (!pipe || pipe2(ends, O_NONBLOCK | O_CLOEXEC)) { free(pipe); return NULL; }
    fcntl(ends[1], F_SETPIPE_SZ, PIPE);  /* refused where pipes are limited: then it has 64 KiB */
    pipe->out = ends[0], pipe->in = ends[1];
    return pipe;
}

static void give_back(struct way *way) {
    struct pipe *pipe = way->pipe;
    way->pipe = NULL;
    if (!pipe) return;
    if (!pipe->held && pooled < POOL) { pool[pooled++] = pipe; return; }
    close(pipe->in), close(pipe->out), free(pipe);
}

static void end(struct connection *c, int reset) {
    if (c->is_dead) return;
    if (reset) {
        struct linger now = {1, 0};
        setsockopt(c->up.from, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        setsockopt(c->up.to, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    close(c->up.from), close(c->up.to);
    give_back(&c->up), give_back(&c->down);
    c->is_dead = 1;
    if (!c->waiting) c->next = dead, dead = c;  /* freed after the batch, which may name it once more */
}

/* 1: more to do, 0: the kernel will tell, -1: broken */
static int run(struct way *way) {
    static char buffer[SMALL];
    for (int turn = 0; turn < TURNS; turn++) {
        while (way->pipe && way->pipe->held) {
            ssize_t sent = splice(way->pipe->out, NULL, way->to, NULL, way->pipe->held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (sent <= 0) return errno == EAGAIN ? 0 : -1;
            way->pipe->held -= sent;
        }
        if (way->ended) {
            give_back(way);
            if (!way->shut) way->shut = 1, shutdown(way->to, SHUT_WR);
            return 0;
        }
        ssize_t got;
        if (way->bulk) {
            if (!way->pipe && !(way->pipe = take_pipe())) return -1;
            got = splice(way->from, NULL, way->pipe->in, NULL, PIPE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (got > 0) way->pipe->held = got;
        } else {
            got = recv(way->from, buffer, SMALL, 0);
            if (got > 0) {
                ssize_t sent = send(way->to, buffer, got, MSG_NOSIGNAL);
                if (sent < 0) {
                    if (errno != EAGAIN) return -1;
                    sent = 0;
                }
                if (sent < got) {
                    if (!(way->pipe = take_pipe())) return -1;
                    if (write(way->pipe->in, buffer + sent, got - sent) != got - sent) return -1;
                    way->pipe->held = got - sent;
                }
                way->bulk = got == SMALL;
            }
        }
        if (got == 0) way->ended = 1;
        if (got < 0) {
            if (errno != EAGAIN) return -1;
            give_back(way);
            return 0;
        }
    }
    return 1;
}

static void serve(struct connection *c) {
    if (c->connecting) {
        int error = 0;
        socklen_t size = sizeof error;
        struct sockaddr_in peer;
        socklen_t length = sizeof peer;
        getsockopt(c->up.to, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) { end(c, 1); return; }
        if (getpeername(c->up.to, (struct sockaddr *)&peer, &length)) return;  /* not yet; its own event will come */
        c->connecting = 0;
    }
    int up = run(&c->up), down = up < 0 ? -1 : run(&c->down);
    if (up < 0 || down < 0) end(c, 1);
    else if (c->up.shut && c->down.shut) end(c, 0);
    else if ((up || down) && !c->waiting) c->waiting = 1, c->next = again, again = c;
}

static void register_end(int fd, struct end *end) {
    struct epoll_event event = {EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, {.ptr = end}};
    epoll_ctl(loop, EPOLL_CTL_ADD, fd, &event);
}

static void take(int listener) {
    static const int on = 1;
    for (;;) {
        struct sockaddr_in from, to;
        socklen_t size = sizeof from, length = sizeof to;
        int client = accept4(listener, (struct sockaddr *)&from, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (client < 0) {
            if (errno == ECONNABORTED || errno == EINTR) continue;
            return;
        }
        getsockname(client, (struct sockaddr *)&to, &length);
        struct connection *c = calloc(1, sizeof *c);
        int server = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (!c || server < 0) { free(c), close(client); continue; }
        c->client.owner = c->server.owner = c;
        c->up = (struct way){.from = client, .to = server};
        c->down = (struct way){.from = server, .to = client};
        c->connecting = 1;
        setsockopt(server, SOL_IP, IP_TRANSPARENT, &on, sizeof on);
        setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (bind(server, (struct sockaddr *)&from, size) ||
            (connect(server, (struct sockaddr *)&to, length) && errno != EINPROGRESS)) {
            end(c, 1);
            continue;
        }
        register_end(server, &c->server);
        register_end(client, &c->client);
    }
}

int main(int count, char **words) {
    static const int on = 1;
    struct rlimit files;
    struct sockaddr_in at = {.sin_family = AF_INET};
    if (count != 3 || inet_pton(AF_INET, words[1], &at.sin_addr) != 1) return 64;
    at.sin_port = htons(atoi(words[2]));
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  /* inherited by what is accepted */
    if (setsockopt(listener, SOL_IP, IP_TRANSPARENT, &on, sizeof on) || bind(listener, (struct sockaddr *)&at, sizeof at) ||
        listen(listener, 4096)) {
        perror("splice_relay");
        return 69;
    }
    loop = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {EPOLLIN, {.ptr = NULL}}, events[BATCH];
    epoll_ctl(loop, EPOLL_CTL_ADD, listener, &event);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int ready = epoll_wait(loop, events, BATCH, again ? 0 : -1);
        for (int i = 0; i < ready; i++) {
            struct end *end = events[i].data.ptr;
            if (!end) take(listener);
            else if (!end->owner->is_dead) serve(end->owner);
        }
        struct connection *todo = again;
        again = NULL;
        while (todo) {
            struct connection *c = todo;
            todo = c->next;
            c->waiting = 0;
            if (c->is_dead) c->next = dead, dead = c;
            else serve(c);
        }
        while (dead) {
            struct connection *c = dead;
            dead = c->next;
            free(c);
        }
    }
}
