/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * HTTP/2 in plaintext: the frames of a connection that a client opened, both ways, to their digest (lib/frames.h).
 *
 * Programs of their own, which egress and ingress end in by a tail call: the verifier takes each apart from the rest,
 * other packets do not pay for them, and a program that calls itself again goes on where one loop must end.
 */
#ifndef EBFW_HTTP2_H
#define EBFW_HTTP2_H

#include "tcp.h"

#define OUT 1
#define IN 0

INLINE void digest_out(struct walk *w)
{
	u64 length = w->used;

	if (length > sizeof(w->bytes)) /* never, which the verifier does not know */
		return;
	w->head.time_ns = bpf_ktime_get_ns();
	w->head.length = length;
	if (bpf_ringbuf_output(MAP(RECORDS), &w->head, sizeof(w->head) + length, wakeup()))
		count_tally(LOST_RING_FULL);
}

INLINE void frames_lose(void)
{
	count_tally(LOST_FRAMES);
}

#include "lib/frames.h"

static void (*tail_call)(void *ctx, void *programs, u32 index) = (void *)BPF_FUNC_tail_call;

INLINE void http2_begins(struct http2 *h, int midway)
{
	h->out.left = midway ? 0 : PREFACE_LENGTH;
	h->out.state = midway ? WALK_MIDWAY : WALK_PREFACE;
	h->in.state = midway ? WALK_MIDWAY : WALK_START;
}

/* This socket speaks HTTP/2 from here on. `midway`: perhaps, and its beginning was not seen. */
INLINE void begin_http2(struct bpf_sock *sk, struct socket *s, u32 seq, int midway)
{
	struct http2 *h = bpf_sk_storage_get(MAP(HTTP2), sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!h) {
		count_tally(LOST_SOCKET);
		s->stage = STAGE_DONE;
		return;
	}
	http2_begins(h, midway);
	h->out.next = seq;
	s->stage = STAGE_HTTP2;
	s->flags |= S_HTTP2;
}

INLINE int frames_packet(struct __sk_buff *skb, int out)
{
	struct bpf_sock *sk = skb->sk;
	struct frames *f;
	struct packet p;
	struct socket *s;
	struct http2 *h;
	struct walk *w;
	int more = 0;
	u32 index;

	if (!sk)
		return 1;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 1;
	s = known_socket(sk);
	h = bpf_sk_storage_get(MAP(HTTP2), sk, 0, 0);
	if (!s || !h || parse_packet(skb, skb->len, &p) || !p.length)
		return 1;
	f = out ? &h->out : &h->in;
	if (frames_skip(f, p.seq, p.length))
		return 1;
	w = borrow_scratch(&index);
	if (!w) {
		frames_lost(f);
		return 1;
	}
	fill_record(&w->head, s, out ? RECORD_FRAMES_OUT : RECORD_FRAMES_IN, 0);
	w->base = p.payload;
	w->length = p.length;
	RELOAD();
	if (frames_place(f, w, p.seq))
		more = frames_run(f, w, skb, 0);
	bpf_map_push_elem(MAP(FREE_SCRATCH), &index, 0);
	if (out && f->state == WALK_OFF) { /* something else after all */
		s->stage = STAGE_DONE;
		s->flags &= ~S_HTTP2;
	}
	if (!more)
		return 1;
	tail_call(skb, out ? MAP(FRAMES_OUT) : MAP(FRAMES_IN), 0);
	/* as often as allowed: more frames in one packet than can be read */
	frames_lost(f);
	f->next = p.seq + p.length;
	return 1;
}

#endif
