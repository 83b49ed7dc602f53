/* loadgen: both ends of five known workloads, for measuring and for exact counts. C99, libc only.
 *
 *   loadgen serve MODE ADDRESS PORT [-n COUNT]     loadgen MODE ADDRESS PORT [-n COUNT] [options]
 *
 *   pingpong   n round trips of m bytes over one TCP connection
 *   http       n HTTP/1.1 requests over one TCP connection, each answered with a body of m bytes
 *   hello      n times: connect, send a TLS ClientHello of m bytes whose server name comes last, close
 *   dns        n queries (A) over UDP, each answered; -c: connected socket, -f: a fresh socket per query
 *   bulk       n writes of m bytes over one TCP connection, no answer
 *
 *   -m BYTES   size of a message (pingpong 64, http 600, hello 1700, bulk 65536)
 *   -s NAME    the name in the ClientHello or the query (load.lab.example)
 *   -p MICROS  pause after every operation, for a steady rate
 *
 * ADDRESS is numeric, IPv4 or IPv6. A server takes port 0 for any; it prints {"ready":PORT} once it listens, ends
 * after COUNT operations (connections for pingpong, http, hello and bulk; queries for dns; 0, the default, is never) or
 * on SIGTERM. Both ends print one JSON line at the end: mode, role, n (operations done), lost (DNS answers that did
 * not come), bytes (payload sent and received), wall_s, user_s, system_s (both without what it took until the program
 * ran). Exit status 1 with a sentence on stderr when something failed.
 *
 * Servers handle one connection at a time: on one CPU anything else only adds system calls to what is measured. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { MAX_MESSAGE = 1 << 20, MAX_HELLO = 16000 };

static struct {
	const char *mode, *name;
	int serve, connected, fresh;
	long count, size, pause_us;
	struct sockaddr_storage address;
	socklen_t length;
} opt = { .name = "load.lab.example" };

static long done, lost;
static unsigned long long bytes;
static volatile sig_atomic_t stopping;
static struct timespec began;
static struct rusage used; /* before it began */
static unsigned char buffer[MAX_MESSAGE];

static void fail(const char *what)
{
	fprintf(stderr, "loadgen %s: %s: %s\n", opt.mode, what, strerror(errno));
	exit(1);
}

static void on_term(int signal_number)
{
	(void)signal_number;
	stopping = 1;
}

static double seconds(struct timeval t)
{
	return (double)t.tv_sec + (double)t.tv_usec / 1e6;
}

static void report(void)
{
	struct timespec now;
	struct rusage usage;
	clock_gettime(CLOCK_MONOTONIC, &now);
	getrusage(RUSAGE_SELF, &usage);
	printf("{\"mode\":\"%s\",\"role\":\"%s\",\"n\":%ld,\"lost\":%ld,\"bytes\":%llu,\"wall_s\":%.6f,"
	       "\"user_s\":%.6f,\"system_s\":%.6f}\n",
	       opt.mode, opt.serve ? "server" : "client", done, lost, bytes,
	       (double)(now.tv_sec - began.tv_sec) + (double)(now.tv_nsec - began.tv_nsec) / 1e9,
	       seconds(usage.ru_utime) - seconds(used.ru_utime), seconds(usage.ru_stime) - seconds(used.ru_stime));
}

static void pause_after(void)
{
	if (opt.pause_us) {
		struct timespec t = { opt.pause_us / 1000000, opt.pause_us % 1000000 * 1000 };
		nanosleep(&t, NULL);
	}
}

static int make_socket(int type)
{
	int one = 1, fd = socket(opt.address.ss_family, type | SOCK_CLOEXEC, 0);
	if (fd < 0)
		fail("socket");
	/* Without it a small write waits for the peer's delayed ACK: 40 ms per round trip. */
	if (type == SOCK_STREAM && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
		fail("TCP_NODELAY");
	return fd;
}

static int connect_socket(int type)
{
	int fd = make_socket(type);
	if (connect(fd, (struct sockaddr *)&opt.address, opt.length))
		fail("connect");
	return fd;
}

static void write_all(int fd, const unsigned char *data, long length)
{
	for (long at = 0; at < length;) {
		ssize_t n = send(fd, data + at, (size_t)(length - at), MSG_NOSIGNAL);
		if (n < 0)
			fail("send");
		at += n;
	}
	bytes += (unsigned long long)length;
}

static void read_all(int fd, long length)
{
	for (long at = 0; at < length;) {
		ssize_t n = recv(fd, buffer + at, (size_t)(length - at), 0);
		if (n <= 0)
			fail(n ? "recv" : "connection closed early");
		at += n;
	}
	bytes += (unsigned long long)length;
}

/* ---- messages */

struct out {
	unsigned char *at;
};

static void put8(struct out *o, unsigned v)
{
	*o->at++ = (unsigned char)v;
}

static void put16(struct out *o, unsigned v)
{
	put8(o, v >> 8 & 255);
	put8(o, v & 255);
}

static void put_noise(struct out *o, long length)
{
	while (length-- > 0)
		put8(o, (unsigned)rand() & 255);
}

/* RFC 8446 4.1.2: a TLS 1.3 ClientHello in one record, `size` bytes in all, in the shape of today's browsers: a
 * post-quantum key share (group 0x11ec, 1,216 bytes) where there is room for it, server_name as the last extension
 * after padding (RFC 7685). Returns its length, which is `size` unless that is too small. */
static long make_hello(unsigned char *to, long size, const char *name)
{
	size_t name_length = strlen(name);
	struct out o = { to + 9 };
	put16(&o, 0x0303);
	put_noise(&o, 32);
	put8(&o, 32);
	put_noise(&o, 32);
	put16(&o, 6); /* cipher suites */
	put16(&o, 0x1301);
	put16(&o, 0x1302);
	put16(&o, 0x1303);
	put16(&o, 0x0100); /* compression: null */
	unsigned char *extensions = o.at;
	o.at += 2;
	put16(&o, 43), put16(&o, 3), put8(&o, 2), put16(&o, 0x0304);                      /* supported_versions */
	put16(&o, 13), put16(&o, 4), put16(&o, 2), put16(&o, 0x0403);                     /* signature_algorithms */
	put16(&o, 10), put16(&o, 6), put16(&o, 4), put16(&o, 0x11ec), put16(&o, 0x001d);  /* supported_groups */
	int quantum = size >= 1500;
	unsigned share = 4 + 32 + (quantum ? 4 + 1216 : 0);
	put16(&o, 51), put16(&o, share + 2), put16(&o, share);
	if (quantum)
		put16(&o, 0x11ec), put16(&o, 1216), put_noise(&o, 1216);
	put16(&o, 0x001d), put16(&o, 32), put_noise(&o, 32);
	long padding = size - (o.at - to) - 4 - (9 + (long)name_length);
	if (padding >= 0) {
		put16(&o, 21), put16(&o, (unsigned)padding);
		memset(o.at, 0, (size_t)padding);
		o.at += padding;
	}
	put16(&o, 0), put16(&o, (unsigned)name_length + 5), put16(&o, (unsigned)name_length + 3);
	put8(&o, 0), put16(&o, (unsigned)name_length);
	memcpy(o.at, name, name_length);
	o.at += name_length;
	unsigned total = (unsigned)(o.at - to);
	o.at = extensions;
	put16(&o, total - (unsigned)(extensions - to) - 2);
	o.at = to;
	put8(&o, 22), put16(&o, 0x0301), put16(&o, total - 5); /* record: handshake */
	put8(&o, 1), put8(&o, 0), put16(&o, total - 9);        /* client_hello */
	return total;
}

/* RFC 1035 4.1: header with RD, one question of type A. */
static long make_query(unsigned char *to, unsigned id, const char *name)
{
	struct out o = { to };
	put16(&o, id), put16(&o, 0x0100), put16(&o, 1), put16(&o, 0), put16(&o, 0), put16(&o, 0);
	while (*name) {
		size_t label = strcspn(name, ".");
		put8(&o, (unsigned)label);
		memcpy(o.at, name, label);
		o.at += label;
		name += label + (name[label] == '.');
	}
	put8(&o, 0), put16(&o, 1), put16(&o, 1);
	return o.at - to;
}

/* ---- clients */

static void pingpong_client(void)
{
	int fd = connect_socket(SOCK_STREAM);
	static unsigned char message[MAX_MESSAGE];
	memset(message, 'x', sizeof message);
	for (; done < opt.count && !stopping; done++) {
		write_all(fd, message, opt.size);
		read_all(fd, opt.size);
		pause_after();
	}
	close(fd);
}

/* What each request of `http` is answered with; its length. */
static long make_response(unsigned char *out)
{
	long head = sprintf((char *)out, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %ld\r\n\r\n",
			    opt.size);
	memset(out + head, 'x', (size_t)opt.size);
	return head + opt.size;
}

static void http_client(void)
{
	int fd = connect_socket(SOCK_STREAM);
	char request[512];
	long length = snprintf(request, sizeof request, "GET /load HTTP/1.1\r\nHost: %s\r\nAccept: */*\r\n\r\n", opt.name);
	long expected = make_response(buffer);
	for (; done < opt.count && !stopping; done++) {
		write_all(fd, (unsigned char *)request, length);
		read_all(fd, expected);
		pause_after();
	}
	close(fd);
}

static void hello_client(void)
{
	static unsigned char hello[MAX_HELLO + 1024];
	long length = make_hello(hello, opt.size, opt.name);
	for (; done < opt.count && !stopping; done++) {
		int fd = connect_socket(SOCK_STREAM);
		write_all(fd, hello, length);
		close(fd);
		pause_after();
	}
}

static void dns_client(void)
{
	unsigned char query[512];
	int fd = -1;
	struct timeval patience = { 2, 0 };
	unsigned id = (unsigned)getpid();
	for (; done < opt.count && !stopping; done++, id++) {
		if (fd < 0) {
			fd = opt.connected ? connect_socket(SOCK_DGRAM) : make_socket(SOCK_DGRAM);
			if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience))
				fail("SO_RCVTIMEO");
		}
		long length = make_query(query, id & 0xffff, opt.name);
		ssize_t n = opt.connected ? send(fd, query, (size_t)length, 0) :
			sendto(fd, query, (size_t)length, 0, (struct sockaddr *)&opt.address, opt.length);
		if (n < 0)
			fail("send");
		bytes += (unsigned long long)n;
		/* An answer to an earlier query, given up meanwhile, is passed over. */
		do {
			n = recv(fd, buffer, sizeof buffer, 0);
		} while (n >= 2 && (buffer[0] << 8 | buffer[1]) != (int)(id & 0xffff));
		if (n < 2)
			lost++;
		else
			bytes += (unsigned long long)n;
		if (opt.fresh) {
			close(fd);
			fd = -1;
		}
		pause_after();
	}
}

static void bulk_client(void)
{
	int fd = connect_socket(SOCK_STREAM);
	static unsigned char message[MAX_MESSAGE];
	memset(message, 'x', sizeof message);
	for (; done < opt.count && !stopping; done++) {
		write_all(fd, message, opt.size);
		pause_after();
	}
	/* The end is when the server has read everything, not when the last byte is in a buffer here. */
	shutdown(fd, SHUT_WR);
	if (recv(fd, buffer, 1, 0) != 0)
		fail("the server did not read to the end");
	close(fd);
}

/* ---- servers */

static void listen_ready(int fd)
{
	struct sockaddr_storage bound;
	socklen_t length = sizeof bound;
	int one = 1;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (struct sockaddr *)&opt.address, opt.length))
		fail("bind");
	if (strcmp(opt.mode, "dns") && listen(fd, 4096))
		fail("listen");
	if (getsockname(fd, (struct sockaddr *)&bound, &length))
		fail("getsockname");
	/* sin_port and sin6_port lie at the same offset. */
	printf("{\"ready\":%d}\n", ntohs(((struct sockaddr_in *)&bound)->sin_port));
	fflush(stdout);
}

static void stream_server(void)
{
	int echo = !strcmp(opt.mode, "pingpong"), listener = make_socket(SOCK_STREAM);
	static unsigned char response[MAX_MESSAGE + 512];
	long answer = strcmp(opt.mode, "http") ? 0 : make_response(response);
	listen_ready(listener);
	while (!stopping && (!opt.count || done < opt.count)) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (fd < 0) {
			if (errno == EINTR || errno == ECONNABORTED)
				continue;
			fail("accept");
		}
		if (!done)
			clock_gettime(CLOCK_MONOTONIC, &began);
		ssize_t n;
		while ((n = recv(fd, buffer, sizeof buffer, 0)) > 0) {
			bytes += (unsigned long long)n;
			if (echo)
				write_all(fd, buffer, n);
			else if (answer) /* a client sends one request at a time, in one piece */
				write_all(fd, response, answer);
		}
		close(fd);
		done++;
	}
}

/* Answers every query with one A record (TTL 60) that points back to the question. */
static void dns_server(void)
{
	static const unsigned char answer[] = { 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, 1 };
	struct sockaddr_storage peer;
	int fd = make_socket(SOCK_DGRAM);
	listen_ready(fd);
	while (!stopping && (!opt.count || done < opt.count)) {
		socklen_t length = sizeof peer;
		ssize_t n = recvfrom(fd, buffer, 512, 0, (struct sockaddr *)&peer, &length);
		if (n < 0 && errno != EINTR)
			fail("recvfrom");
		if (n < 12)
			continue;
		if (!done)
			clock_gettime(CLOCK_MONOTONIC, &began);
		bytes += (unsigned long long)n;
		buffer[2] |= 0x80, buffer[3] = 0x80, buffer[7] = 1;
		memcpy(buffer + n, answer, sizeof answer);
		n = sendto(fd, buffer, (size_t)n + sizeof answer, 0, (struct sockaddr *)&peer, length);
		bytes += n > 0 ? (unsigned long long)n : 0;
		done++;
	}
}

static int parse_address(const char *text, const char *port)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)&opt.address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&opt.address;
	in_port_t number = htons((uint16_t)atoi(port));
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET, v4->sin_port = number, opt.length = sizeof *v4;
		return 1;
	}
	if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6, v6->sin6_port = number, opt.length = sizeof *v6;
		return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	static const struct {
		const char *mode;
		void (*client)(void), (*server)(void);
		long size;
	} modes[] = {
		{ "pingpong", pingpong_client, stream_server, 64 },
		{ "http", http_client, stream_server, 600 },
		{ "hello", hello_client, stream_server, 1700 },
		{ "dns", dns_client, dns_server, 0 },
		{ "bulk", bulk_client, stream_server, 65536 },
	};
	opt.serve = argc > 1 && !strcmp(argv[1], "serve");
	argv += opt.serve, argc -= opt.serve;
	opt.count = opt.serve ? 0 : 1;
	size_t which = 0, known = sizeof modes / sizeof *modes;
	while (which < known && argc > 1 && strcmp(argv[1], modes[which].mode))
		which++;
	if (argc < 4 || which == known || !parse_address(argv[2], argv[3])) {
		fprintf(stderr, "usage: loadgen [serve] pingpong|http|hello|dns|bulk ADDRESS PORT [-n COUNT] [-m BYTES]"
				" [-s NAME] [-p MICROS] [-c] [-f]\n");
		return 2;
	}
	opt.mode = modes[which].mode, opt.size = modes[which].size;
	argv += 3, argc -= 3;
	for (int c; (c = getopt(argc, argv, "n:m:s:p:cf")) != -1;)
		switch (c) {
		case 'n': opt.count = atol(optarg); break;
		case 'm': opt.size = atol(optarg); break;
		case 's': opt.name = optarg; break;
		case 'p': opt.pause_us = atol(optarg); break;
		case 'c': opt.connected = 1; break;
		case 'f': opt.fresh = 1; break;
		default: return 2;
		}
	long most = strcmp(opt.mode, "hello") ? MAX_MESSAGE : MAX_HELLO;
	if (opt.size < 0 || opt.size > most || strlen(opt.name) > 253) {
		fprintf(stderr, "loadgen: -m takes 0 to %ld bytes, -s a name of at most 253\n", most);
		return 2;
	}
	/* No SA_RESTART: SIGTERM has to end a blocking accept or recv. */
	struct sigaction action = { .sa_handler = on_term };
	sigaction(SIGTERM, &action, NULL);
	clock_gettime(CLOCK_MONOTONIC, &began);
	getrusage(RUSAGE_SELF, &used);
	if (opt.serve)
		modes[which].server();
	else
		modes[which].client();
	report();
	return 0;
}
