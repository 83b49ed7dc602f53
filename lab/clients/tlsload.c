/* tlsload: both ends of HTTP/1.1 in TLS, for measuring what probes on a TLS library cost. C99, libc and a libssl that
 * is opened by its path: a private copy, so that a probe on it concerns nobody else.
 *
 *   tlsload serve LIBSSL CERT KEY ADDRESS     tlsload LIBSSL ADDRESS PORT COUNT
 *
 * The client makes COUNT requests over one connection, one after the other, each one call of SSL_write, and reads what
 * each is answered with: 600 bytes of body. ADDRESS is numeric IPv4. The server prints {"ready":PORT} once it listens,
 * takes one connection after the other, and ends when its standard input does. The client prints one JSON line: mode,
 * n (requests answered), wall_s (from the first request to the last answer, the handshake left out). Exit status 1
 * with a sentence on stderr when something failed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BODY = 600, PEM = 1 };

static struct {
	const void *(*TLS_server_method)(void), *(*TLS_client_method)(void);
	void *(*SSL_CTX_new)(const void *method), *(*SSL_new)(void *context);
	int (*SSL_CTX_use_certificate_file)(void *context, const char *path, int type);
	int (*SSL_CTX_use_PrivateKey_file)(void *context, const char *path, int type);
	int (*SSL_set_fd)(void *ssl, int fd), (*SSL_accept)(void *ssl), (*SSL_connect)(void *ssl);
	int (*SSL_read)(void *ssl, void *to, int size), (*SSL_write)(void *ssl, const void *from, int size);
	int (*SSL_shutdown)(void *ssl);
	void (*SSL_free)(void *ssl);
} tls;

static char buffer[16384];

static void fail(const char *what)
{
	fprintf(stderr, "tlsload: %s: %s\n", what, errno ? strerror(errno) : "the library says no");
	exit(1);
}

static void open_library(const char *path)
{
	void *library = dlopen(path, RTLD_NOW);
	if (!library) {
		fprintf(stderr, "tlsload: %s\n", dlerror());
		exit(1);
	}
/* The way that POSIX shows: ISO C knows no conversion from an object pointer to a function's. */
#define FIND(name) \
	if (!(*(void **)&tls.name = dlsym(library, #name))) \
		fail(#name)
	FIND(TLS_server_method);
	FIND(TLS_client_method);
	FIND(SSL_CTX_new);
	FIND(SSL_new);
	FIND(SSL_CTX_use_certificate_file);
	FIND(SSL_CTX_use_PrivateKey_file);
	FIND(SSL_set_fd);
	FIND(SSL_accept);
	FIND(SSL_connect);
	FIND(SSL_read);
	FIND(SSL_write);
	FIND(SSL_shutdown);
	FIND(SSL_free);
}

static int make_socket(struct sockaddr_in *address, const char *text, int port)
{
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	address->sin_family = AF_INET;
	address->sin_port = htons((uint16_t)port);
	if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
		fail("socket");
	if (inet_pton(AF_INET, text, &address->sin_addr) != 1)
		fail("this is no IPv4 address");
	return fd;
}

static void *session(void *context, int fd)
{
	void *ssl = tls.SSL_new(context);
	if (!ssl || tls.SSL_set_fd(ssl, fd) != 1)
		fail("SSL_new");
	return ssl;
}

/* What each request is answered with; its length. */
static int make_response(char *out)
{
	int head = sprintf(out, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", BODY);
	memset(out + head, 'x', BODY);
	return head + BODY;
}

static int serve(char **argv)
{
	static char response[1024];
	int length = make_response(response);
	struct sockaddr_in address = { 0 };
	socklen_t size = sizeof address;
	int listener = make_socket(&address, argv[5], 0);
	void *context = tls.SSL_CTX_new(tls.TLS_server_method());
	if (!context || tls.SSL_CTX_use_certificate_file(context, argv[3], PEM) != 1 ||
	    tls.SSL_CTX_use_PrivateKey_file(context, argv[4], PEM) != 1)
		fail("the certificate and its key");
	if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 8) ||
	    getsockname(listener, (struct sockaddr *)&address, &size))
		fail("listen");
	printf("{\"ready\":%d}\n", ntohs(address.sin_port));
	fflush(stdout);
	for (;;) {
		struct pollfd wait[2] = { { .fd = 0, .events = POLLIN }, { .fd = listener, .events = POLLIN } };
		if (poll(wait, 2, -1) < 0)
			fail("poll");
		if (wait[0].revents)
			return 0;
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC), one = 1;
		if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
			fail("accept");
		void *ssl = session(context, fd);
		if (tls.SSL_accept(ssl) == 1)
			while (tls.SSL_read(ssl, buffer, sizeof buffer) > 0) /* one request at a time, in one piece */
				if (tls.SSL_write(ssl, response, length) != length)
					fail("SSL_write");
		tls.SSL_free(ssl);
		close(fd);
	}
}

static int ask(char **argv)
{
	static const char request[] = "GET /load HTTP/1.1\r\nHost: load.lab.example\r\nAccept: */*\r\n\r\n";
	struct sockaddr_in address = { 0 };
	struct timespec began, ended;
	int expected = make_response(buffer), fd = make_socket(&address, argv[2], atoi(argv[3]));
	long count = atol(argv[4]), done = 0;
	void *context = tls.SSL_CTX_new(tls.TLS_client_method());
	if (!context)
		fail("SSL_CTX_new");
	if (connect(fd, (struct sockaddr *)&address, sizeof address))
		fail("connect");
	void *ssl = session(context, fd);
	if (tls.SSL_connect(ssl) != 1)
		fail("the handshake");
	clock_gettime(CLOCK_MONOTONIC, &began);
	for (; done < count; done++) {
		if (tls.SSL_write(ssl, request, sizeof request - 1) != sizeof request - 1)
			fail("SSL_write");
		for (int at = 0, n; at < expected; at += n)
			if ((n = tls.SSL_read(ssl, buffer, sizeof buffer)) <= 0)
				fail("SSL_read");
	}
	clock_gettime(CLOCK_MONOTONIC, &ended);
	tls.SSL_shutdown(ssl);
	tls.SSL_free(ssl);
	close(fd);
	printf("{\"mode\":\"https\",\"n\":%ld,\"wall_s\":%.6f}\n", done,
	       (double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec) / 1e9);
	return 0;
}

int main(int argc, char **argv)
{
	int server = argc == 6 && !strcmp(argv[1], "serve");
	if (!server && argc != 5) {
		fprintf(stderr, "usage: tlsload serve LIBSSL CERT KEY ADDRESS\n       tlsload LIBSSL ADDRESS PORT COUNT\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	open_library(argv[server ? 2 : 1]);
	return server ? serve(argv) : ask(argv);
}
