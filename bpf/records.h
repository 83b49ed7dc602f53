/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What goes up the ring: only what becomes a span, a log or a line. Waking a reader costs the application that sent
 * the packet 7 to 10 us; so nobody is woken unless the ring fills, and the agent comes by on a timer.
 */
#ifndef EBFW_RECORDS_H
#define EBFW_RECORDS_H

#include "socket.h"
#include "lib/head.h"

INLINE u64 wakeup(void)
{
	u32 zero = 0;
	struct settings *settings = bpf_map_lookup_elem(MAP(SETTINGS), &zero);

	if (LIKELY(!settings || bpf_ringbuf_query(MAP(RECORDS), BPF_RB_AVAIL_DATA) < settings->wakeup_bytes))
		return BPF_RB_NO_WAKEUP;
	/* Above the mark, too, one wake-up every 64 KiB or so is enough: a reader that cannot keep up is awake. */
	if ((bpf_ringbuf_query(MAP(RECORDS), BPF_RB_PROD_POS) & 0xffff) >= 512)
		return BPF_RB_NO_WAKEUP;
	return BPF_RB_FORCE_WAKEUP;
}

/* The part of a record that every kind has. */
INLINE void fill_record(struct record *r, const struct socket *s, u8 kind, u64 now)
{
	r->time_ns = now;
	r->cgroup = s->cgroup;
	r->cookie = s->cookie;
	r->name = s->name;
	copy16(r->local, s->local);
	copy16(r->peer, s->peer);
	copy16(r->comm, s->comm);
	r->pid = s->pid;
	r->local_port = s->local_port;
	r->peer_port = s->peer_port;
	r->kind = kind;
	r->transport = s->transport;
	r->role = s->role;
	r->scope = s->scope;
	r->outcome = 0;
	r->flags = (s->flags & S_PROXIED ? RECORD_PROXIED : 0) | (s->flags & S_REDIRECTED ? RECORD_REDIRECTED : 0);
	r->length = 0;
	r->duration_ns = 0;
	r->tx_bytes = 0;
	r->rx_bytes = 0;
	r->retransmits = 0;
	r->rtt_us = 0;
	r->offset = 0;
	r->sequence = 0;
}

INLINE struct record *reserve_record(u64 size)
{
	struct record *r = bpf_ringbuf_reserve(MAP(RECORDS), size, 0);

	if (UNLIKELY(!r))
		count_tally(LOST_RING_FULL);
	return r;
}

/*
 * A record with n bytes of the packet at `offset` behind it. bpf_ringbuf_reserve wants a constant size, so there are
 * a few rooms. n - 1, masked, + 1 shows verifiers before 6.13 that the length is never zero.
 */
#define SHIP(room)                                                                                            \
	do {                                                                                                      \
		struct {                                                                                              \
			struct record head;                                                                               \
			u8 payload[room];                                                                                 \
		} *b = (void *)reserve_record(sizeof(*b));                                                            \
		u64 take = n - 1;                                                                                     \
                                                                                                              \
		if (UNLIKELY(!b))                                                                                     \
			return;                                                                                           \
		BOUND(take, (room) - 1);                                                                              \
		take += 1;                                                                                            \
		fill_record(&b->head, s, parcel->kind, now);                                                                  \
		if (UNLIKELY(bpf_skb_load_bytes(skb, parcel->offset, b->payload, take))) {                                    \
			bpf_ringbuf_discard(b, BPF_RB_NO_WAKEUP);                                                         \
			return;                                                                                           \
		}                                                                                                     \
		parcel->status = *(u32 *)(b->payload + STATUS_AT);                                                    \
		b->head.length = take;                                                                                \
		b->head.flags |= parcel->flags | (take < parcel->length ? RECORD_TRUNCATED : 0);                                           \
		b->head.offset = parcel->stream_offset;                                                                       \
		b->head.sequence = parcel->sequence;                                                                          \
		b->head.tx_bytes = parcel->sent;                                                                              \
		b->head.rx_bytes = parcel->received;                                                                          \
		bpf_ringbuf_submit(b, wakeup());                                                                      \
		return;                                                                                               \
	} while (0)

/* A piece of the packet that is to go up. */
struct parcel {
	u32 offset; /* in the packet */
	u32 length; /* 0 = nothing to ship */
	u32 stream_offset;
	u32 cut; /* counted from `offset`: what is left out, up to cut_end; 0 = nothing */
	u32 cut_end;
	u32 sequence;
	u32 sent;     /* of the request so far */
	u32 received; /* in this packet */
	u32 status;   /* what is at STATUS_AT of a payload that was shipped; older bytes where it is shorter */
	u8 kind;
	u8 flags;
	u16 pad;
};

#define CUT_PART 512

/* A record with what lies before the cut and behind it, each of 1 to CUT_PART bytes. */
INLINE void ship_cut(struct __sk_buff *skb, const struct socket *s, const struct parcel *parcel)
{
	struct {
		struct record head;
		u8 payload[2 * CUT_PART];
	} *b = (void *)reserve_record(sizeof(*b));
	u64 before = parcel->cut - 1, behind = parcel->length - parcel->cut_end - 1;

	if (!b)
		return;
	BOUND(before, CUT_PART - 1);
	before += 1;
	BOUND(behind, CUT_PART - 1);
	behind += 1;
	fill_record(&b->head, s, parcel->kind, bpf_ktime_get_ns());
	if (bpf_skb_load_bytes(skb, parcel->offset, b->payload, before) ||
	    bpf_skb_load_bytes(skb, parcel->offset + parcel->cut_end, b->payload + before, behind)) {
		bpf_ringbuf_discard(b, BPF_RB_NO_WAKEUP);
		return;
	}
	b->head.length = before + behind;
	b->head.flags |= parcel->flags | RECORD_CUT;
	bpf_ringbuf_submit(b, wakeup());
}

INLINE void ship(struct __sk_buff *skb, const struct socket *s, struct parcel *parcel)
{
	u64 now, n = parcel->length;

	if (!n)
		return;
	if (UNLIKELY(parcel->cut)) {
		ship_cut(skb, s, parcel);
		return;
	}
	if (n > ROOM_GIANT)
		n = ROOM_GIANT;
	now = bpf_ktime_get_ns();
	if (n <= ROOM_SMALL)
		SHIP(ROOM_SMALL);
	if (n <= ROOM_MEDIUM)
		SHIP(ROOM_MEDIUM);
	if (n <= ROOM_LARGE)
		SHIP(ROOM_LARGE);
	if (n <= ROOM_HUGE)
		SHIP(ROOM_HUGE);
	SHIP(ROOM_GIANT);
}

/* How much of a response has come, and when the last of it came. */
INLINE void tell_received(struct socket *s, u8 flags)
{
	struct record *r = reserve_record(sizeof(*r));

	s->more = 0;
	if (!r)
		return;
	fill_record(r, s, RECORD_RECEIVED, s->response_ns);
	r->flags |= flags;
	r->sequence = s->answers;
	r->rx_bytes = s->response_bytes;
	bpf_ringbuf_submit(r, wakeup());
}

#endif
