/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What an application hands to its TLS library before it is encrypted, and what it gets back: uprobes on OpenSSL's
 * SSL_write, SSL_read, their _ex forms and SSL_free, and on their likes in GnuTLS and Go. Of what is written only the
 * head of an HTTP request is taken, of what is read the first bytes of its response; of the rest, how much there was
 * and when. Of HTTP/2 the digest is taken, both ways (lib/frames.h). A server writes nothing
 * that looks like a request, and so is never reported. Scoped to the configured cgroup subtree here, in the kernel: a
 * probe is on the library's file, which every process on the host may share.
 */
#ifndef EBFW_TLS_H
#define EBFW_TLS_H

#include "http2.h"
#include "lib/head.h"

/* The layout of struct pt_regs (x86-64) and struct user_pt_regs (arm64) as uprobes see it: ABI, not a header. */
#if defined(EBFW_ARCH_X86_64)
struct registers {
	u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
};
#define ARGUMENT1(regs) ((regs)->di)
#define ARGUMENT2(regs) ((regs)->si)
#define ARGUMENT3(regs) ((regs)->dx)
#define ARGUMENT4(regs) ((regs)->cx)
#define RESULT(regs) ((regs)->ax)
/* Go passes arguments and results in registers of its own choice (internal ABI, since 1.17), and keeps the goroutine
 * in one: it may go on in another thread, so that a call is known by it. */
#define GO_ARGUMENT1(regs) ((regs)->ax)
#define GO_ARGUMENT2(regs) ((regs)->bx)
#define GO_ARGUMENT3(regs) ((regs)->cx)
#define GOROUTINE(regs) ((regs)->r14)
#elif defined(EBFW_ARCH_AARCH64)
struct registers {
	u64 regs[31];
};
#define ARGUMENT1(regs) ((regs)->regs[0])
#define ARGUMENT2(regs) ((regs)->regs[1])
#define ARGUMENT3(regs) ((regs)->regs[2])
#define ARGUMENT4(regs) ((regs)->regs[3])
#define RESULT(regs) ((regs)->regs[0])
#define GO_ARGUMENT1(regs) ((regs)->regs[0])
#define GO_ARGUMENT2(regs) ((regs)->regs[1])
#define GO_ARGUMENT3(regs) ((regs)->regs[2])
#define GOROUTINE(regs) ((regs)->regs[28])
#else
#error "TLS probes know the registers of x86-64 and arm64 only"
#endif

#define TLS_COOKIE (1ULL << 63)

INLINE struct tls_key tls_key_of(u64 connection)
{
	struct tls_key key = {.connection = connection, .pid = bpf_get_current_pid_tgid() >> 32};

	return key;
}

INLINE struct tls_stream *tls_stream_of(u64 connection)
{
	struct tls_key key = tls_key_of(connection);

	return bpf_map_lookup_elem(MAP(TLS_STREAMS), &key);
}

INLINE void fill_tls(struct record *r, const struct tls_stream *stream, u8 kind, u64 now)
{
	__builtin_memset(r, 0, sizeof(*r));
	r->time_ns = now;
	r->cgroup = bpf_get_current_cgroup_id();
	r->cookie = stream->cookie;
	r->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(r->comm, sizeof(r->comm));
	r->kind = kind;
	r->transport = PROTO_TCP;
	r->role = ROLE_CLIENT;
}

/* A record with n bytes of the task's memory behind it; for the rooms and n - 1 + 1 see SHIP. */
#define SHIP_USER(room)                                                                                       \
	do {                                                                                                      \
		struct {                                                                                              \
			struct record head;                                                                               \
			u8 payload[room];                                                                                 \
		} *b = (void *)reserve_record(sizeof(*b));                                                            \
		u64 take = n - 1;                                                                                     \
                                                                                                              \
		if (!b)                                                                                               \
			return;                                                                                           \
		BOUND(take, (room) - 1);                                                                              \
		take += 1;                                                                                            \
		fill_tls(&b->head, stream, kind, now);                                                                \
		b->head.length = take;                                                                                \
		b->head.flags = take < whole ? RECORD_TRUNCATED : 0;                                                  \
		b->head.sequence = kind == RECORD_TLS_WRITE ? stream->requests : stream->answers + 1;                 \
		b->head.tx_bytes = stream->sent_bytes;                                                                \
		b->head.rx_bytes = kind == RECORD_TLS_WRITE ? 0 : whole;                                              \
		if (bpf_probe_read_user(b->payload, take, (void *)data)) {                                            \
			bpf_ringbuf_discard(b, BPF_RB_NO_WAKEUP);                                                         \
			return;                                                                                           \
		}                                                                                                     \
		bpf_ringbuf_submit(b, wakeup());                                                                      \
		return;                                                                                               \
	} while (0)

INLINE void ship_user(const struct tls_stream *stream, u8 kind, u64 data, u64 whole, u64 most, u64 now)
{
	u64 n = whole > most ? most : whole;

	if (n <= ROOM_MEDIUM)
		SHIP_USER(ROOM_MEDIUM);
	if (n <= ROOM_LARGE)
		SHIP_USER(ROOM_LARGE);
	SHIP_USER(ROOM_HUGE);
}

INLINE void tell_tls_received(struct tls_stream *stream, u8 flags)
{
	struct record *r = reserve_record(sizeof(*r));

	stream->more = 0;
	if (!r)
		return;
	fill_tls(r, stream, RECORD_RECEIVED, stream->response_ns);
	r->flags = flags;
	r->sequence = stream->answers;
	r->rx_bytes = stream->response_bytes;
	bpf_ringbuf_submit(r, wakeup());
}

INLINE struct tls_stream *new_tls_stream(u64 connection)
{
	struct tls_key key = tls_key_of(connection);
	struct tls_stream fresh = {};

	/* two connections of one moment differ in their place in memory, and in the process */
	fresh.cookie = TLS_COOKIE | (bpf_ktime_get_ns() ^ connection >> 4 ^ (u64)key.pid << 40);
	bpf_map_update_elem(MAP(TLS_STREAMS), &key, &fresh, BPF_ANY);
	return bpf_map_lookup_elem(MAP(TLS_STREAMS), &key);
}

enum beginning { BEGINS_NOTHING, BEGINS_REQUEST, BEGINS_HTTP2, CONTINUES_HTTP2 };

/* What is sent here: a request, HTTP/2's preface, a HEADERS frame with a whole header block, or something else? */
INLINE enum beginning beginning(u64 data, u64 n)
{
	u32 words[3] = {};
	u8 *b = (u8 *)words;

	if (n < 16 || bpf_probe_read_user(words, sizeof(words), (void *)data))
		return BEGINS_NOTHING;
	if (is_method(words[0]))
		return BEGINS_REQUEST;
	if (words[0] == FOUR('P', 'R', 'I', ' '))
		return BEGINS_HTTP2;
	if (!b[0] && b[1] <= 0x40 && b[3] == FRAME_HEADERS && b[4] & FRAME_END_HEADERS && !(b[4] & ~0x2d) &&
	    !(b[5] & 0x80) && b[8] & 1)
		return CONTINUES_HTTP2;
	return BEGINS_NOTHING;
}

/* HTTP/2 of a connection whose preface is being sent or, `midway`, was sent before we looked. */
INLINE struct http2 *new_tls_http2(u64 connection, int midway)
{
	struct tls_key key = tls_key_of(connection);
	struct http2 fresh = {};

	http2_begins(&fresh, midway);
	bpf_map_update_elem(MAP(TLS_HTTP2), &key, &fresh, BPF_ANY);
	return bpf_map_lookup_elem(MAP(TLS_HTTP2), &key);
}

#define WALKING (1ULL << 62)

/* The n bytes at `data` were sent or received through a connection that speaks HTTP/2. Ends the program. */
INLINE void tls_walk(void *ctx, u64 connection, u64 data, u64 n, u32 out)
{
	u64 thread = WALKING | bpf_get_current_pid_tgid();
	struct tls_call call = {.connection = connection, .buffer = data, .count_at = n, .out = out};

	bpf_map_update_elem(MAP(TLS_CALLS), &thread, &call, BPF_ANY);
	tail_call(ctx, MAP(FRAMES_TLS), 0);
	bpf_map_delete_elem(MAP(TLS_CALLS), &thread);
}

/* One run over what is left to walk in this thread; calls itself until nothing is. */
INLINE void frames_tls(void *ctx)
{
	u64 thread = WALKING | bpf_get_current_pid_tgid();
	struct tls_call *call = bpf_map_lookup_elem(MAP(TLS_CALLS), &thread);
	struct tls_stream *stream;
	struct tls_key key;
	struct frames *f;
	struct http2 *h;
	struct walk *w;
	int more = 0;
	u32 index;

	if (!call)
		return;
	key = tls_key_of(call->connection);
	stream = bpf_map_lookup_elem(MAP(TLS_STREAMS), &key);
	h = bpf_map_lookup_elem(MAP(TLS_HTTP2), &key);
	if (!h)
		h = new_tls_http2(call->connection, 1);
	if (stream && h) {
		f = call->out ? &h->out : &h->in;
		w = borrow_scratch(&index);
		if (w) {
			fill_tls(&w->head, stream, call->out ? RECORD_FRAMES_OUT : RECORD_FRAMES_IN, 0);
			w->memory = call->buffer;
			w->length = call->count_at;
			w->position = 0;
			RELOAD();
			more = frames_run(f, w, 0, 1);
			call->buffer += w->position;
			call->count_at -= w->position;
			bpf_map_push_elem(MAP(FREE_SCRATCH), &index, 0);
		}
		if (more)
			tail_call(ctx, MAP(FRAMES_TLS), 0);
		if (!w || more) /* no memory, or more frames in one piece than can be read */
			frames_lost(f);
	}
	bpf_map_delete_elem(MAP(TLS_CALLS), &thread);
}

/* An application sends n bytes at `data` through a TLS connection; `now`: when it called its library. */
INLINE void tls_sends(void *ctx, u64 connection, u64 data, u64 n, u64 now)
{
	struct tls_stream *stream;
	enum beginning what;

	if (!n || n > 0x7fffffff)
		return;
	stream = tls_stream_of(connection);
	if (stream && stream->http2) {
		tls_walk(ctx, connection, data, n, OUT);
		return;
	}
	what = beginning(data, n);
	if (what != BEGINS_REQUEST) {
		if (stream) {
			stream->sent_bytes += n;
		} else if (what) {
			stream = new_tls_stream(connection);
			if (!stream || !new_tls_http2(connection, what == CONTINUES_HTTP2))
				return;
			stream->http2 = 1;
			tls_walk(ctx, connection, data, n, OUT);
		}
		return;
	}
	if (!stream)
		stream = new_tls_stream(connection);
	if (!stream)
		return;
	if (stream->more)
		tell_tls_received(stream, 0);
	stream->requests += 1;
	stream->sent_bytes = n;
	ship_user(stream, RECORD_TLS_WRITE, data, n, ROOM_HUGE, now);
}

/*
 * A call that writes, and its end. Only the end tells whether anything was sent: a call that would block, or that comes
 * before the handshake is done (Node), fails and is made again with the same bytes.
 */
#define WRITING (1ULL << 63)
INLINE void tls_offers(u64 connection, u64 data, u64 n, u64 sent_at)
{
	u64 thread = WRITING | bpf_get_current_pid_tgid();
	struct tls_call call = {.connection = connection, .buffer = data, .count_at = n, .sent_at = sent_at};

	if (!n || !in_scope() || (!tls_stream_of(connection) && !beginning(data, n)))
		return;
	call.time_ns = bpf_ktime_get_ns();
	bpf_map_update_elem(MAP(TLS_CALLS), &thread, &call, BPF_ANY);
}

/* `result`: how many bytes were taken or, of the _ex form, 1; nothing or an error below 1. */
INLINE void tls_write_returns(void *ctx, u64 result)
{
	u64 thread = WRITING | bpf_get_current_pid_tgid(), n = (u32)result;
	struct tls_call *found = bpf_map_lookup_elem(MAP(TLS_CALLS), &thread), call;

	if (!found)
		return;
	call = *found;
	bpf_map_delete_elem(MAP(TLS_CALLS), &thread);
	if (!n || n > 0x7fffffff || (call.sent_at && bpf_probe_read_user(&n, sizeof(n), (void *)call.sent_at)))
		return;
	tls_sends(ctx, call.connection, call.buffer, n < call.count_at ? n : call.count_at, call.time_ns);
}

/* A goroutine among all threads: where it is described lies below 2^42, and numbers of processes below 2^22. */
INLINE u64 goroutine(u64 address)
{
	return (bpf_get_current_pid_tgid() >> 32 << 42) ^ address;
}

/* An application asks for what a TLS connection has received; nothing is there before it returns. `thread`: what the
 * call and its return have in common. */
INLINE void tls_asks(u64 thread, u64 connection, u64 buffer, u64 count_at)
{
	struct tls_call call = {.connection = connection, .buffer = buffer, .count_at = count_at};

	bpf_map_update_elem(MAP(TLS_CALLS), &thread, &call, BPF_ANY);
}

/* It has got n bytes at `data`. */
INLINE void tls_receives(void *ctx, u64 connection, u64 data, u64 n)
{
	struct tls_stream *stream = tls_stream_of(connection);
	struct received received;
	u64 tail = 0;
	u32 status = 0;

	if (!stream)
		return;
	if (stream->http2) {
		tls_walk(ctx, connection, data, n, IN);
		return;
	}
	if (stream->requests != stream->answers) {
		stream->response_bytes = n;
		ship_user(stream, RECORD_RESPONSE, data, n, ROOM_LARGE, bpf_ktime_get_ns());
		/* the final response follows an interim one */
		if (n >= STATUS_LINE && !bpf_probe_read_user(&status, sizeof(status), (void *)data + STATUS_AT) &&
		    is_interim(status) && !is_upgrade(status))
			return;
		stream->answers += 1;
		return;
	}
	stream->response_bytes += n;
	stream->response_ns = bpf_ktime_get_ns();
	stream->more = 1;
	if (n >= LAST_CHUNK && !bpf_probe_read_user(&tail, LAST_CHUNK, (void *)data + n - LAST_CHUNK) &&
	    is_last_chunk(tail)) {
		tell_tls_received(stream, RECORD_LAST_CHUNK);
		return;
	}
	received.bytes = stream->response_bytes;
	received.last_ns = stream->response_ns;
	bpf_map_update_elem(MAP(RECEIVED), &stream->cookie, &received, BPF_ANY);
}

/* A call to read returns `result`: how much was read or, where count_at is set, 1. */
INLINE void tls_read_returns(void *ctx, u64 thread, u64 result)
{
	u64 n = result;
	struct tls_call *found = bpf_map_lookup_elem(MAP(TLS_CALLS), &thread), call;

	if (!found)
		return;
	call = *found;
	bpf_map_delete_elem(MAP(TLS_CALLS), &thread);
	if (call.count_at && ((u32)result != 1 || bpf_probe_read_user(&n, sizeof(n), (void *)call.count_at)))
		return;
	n = (u32)n;
	if (n && n <= 0x7fffffff)
		tls_receives(ctx, call.connection, call.buffer, n);
}

INLINE void tls_freed(u64 connection)
{
	struct tls_key key = tls_key_of(connection);
	struct tls_stream *stream = bpf_map_lookup_elem(MAP(TLS_STREAMS), &key);
	struct record *r;

	if (!stream)
		return;
	if (stream->more)
		tell_tls_received(stream, 0);
	r = reserve_record(sizeof(*r));
	if (r) {
		fill_tls(r, stream, RECORD_TLS_CLOSED, bpf_ktime_get_ns());
		bpf_ringbuf_submit(r, wakeup());
	}
	bpf_map_delete_elem(MAP(TLS_STREAMS), &key);
	bpf_map_delete_elem(MAP(TLS_HTTP2), &key);
}

#endif
