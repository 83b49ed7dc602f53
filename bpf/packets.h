/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Every packet of every socket in the subtree: cgroup_skb egress and ingress. Counts it, and looks into the payload
 * only while there is something to learn: the client's first bytes, HTTP requests, DNS.
 *
 * The peer is the socket's, never the packet's: behind DNAT or a mesh redirect the two differ. Egress payload is
 * never linear, so it is read with bpf_skb_load_bytes alone. TCP transmits under the socket's lock, which makes its
 * storage ours; ingress runs before that lock, hence the atomic there.
 */
#ifndef EBFW_PACKETS_H
#define EBFW_PACKETS_H

#include "http2.h"
#include "lib/head.h"

#define SOCKET_RAW 3 /* SOCK_RAW */
#define HEAD_LIMIT 8192

INLINE int plain(struct __sk_buff *skb, struct packet *p)
{
	return parse_plain((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, p);
}

INLINE int parse(struct __sk_buff *skb, struct packet *p)
{
	return LIKELY(!plain(skb, p)) ? 0 : parse_packet(skb, skb->len, p);
}

INLINE void count_packet(struct __sk_buff *skb, struct traffic *t, int out)
{
	u64 packets = skb->gso_segs;

	packets += !packets; /* 0 for SYN-ACK, RST and UDP */
	if (out) {
		ADD(t->tx_bytes, skb->len);
		ADD(t->tx_packets, packets);
	} else {
		ADD(t->rx_bytes, skb->len);
		ADD(t->rx_packets, packets);
	}
}

/* Does someone listen where this connection ends here? Then it was accepted. */
INLINE int has_listener(struct __sk_buff *skb, struct bpf_sock *sk, const struct packet *p, int out)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *listener;

	if (skb->protocol == bpf_htons(0x0800)) {
		tuple.ipv4.daddr = *(u32 *)((out ? p->source : p->dest) + 12);
		tuple.ipv4.dport = bpf_htons(sk->src_port);
		listener = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		copy16(tuple.ipv6.daddr, out ? p->source : p->dest);
		tuple.ipv6.dport = bpf_htons(sk->src_port);
		listener = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!listener)
		return 0;
	bpf_sk_release(listener);
	return 1;
}

/* The connected peer of a socket; 0 where it has none. */
INLINE int connected_peer(struct bpf_sock *sk, struct socket *s)
{
	u16 port = sk->dst_port;

	if (!port)
		return 0;
	s->peer_port = bpf_ntohs(port);
	if (sk->family == 2) {
		set_v4(s->peer, sk->dst_ip4);
	} else {
		((u32 *)s->peer)[0] = sk->dst_ip6[0];
		((u32 *)s->peer)[1] = sk->dst_ip6[1];
		((u32 *)s->peer)[2] = sk->dst_ip6[2];
		((u32 *)s->peer)[3] = sk->dst_ip6[3];
	}
	return 1;
}

INLINE void inbound_key(u64 cgroup, u16 port, struct flow_key *key)
{
	key->cgroup = cgroup;
	key->port = port;
	key->transport = PROTO_TCP;
	key->role = ROLE_SERVER;
	key->kind = FLOW_INBOUND;
}

/* Its counters; 0 = it has no row, or a slot that is no longer its own. */
INLINE struct traffic *find_inbound(u64 cgroup, u16 port, struct inbound *cached)
{
	struct flow_key key = {};
	struct flow_row *row, found;
	struct traffic *t;
	u32 version;

	inbound_key(cgroup, port, &key);
	row = bpf_map_lookup_elem(MAP(FLOWS), &key);
	if (!row)
		return 0;
	found = *row;
	t = stripe(found.slot, found.generation, stride());
	if (!t)
		return 0;
	/* The memory of a row that is deleted is another's at once: what stays here must be found twice. */
	row = bpf_map_lookup_elem(MAP(FLOWS), &key);
	version = cached->version;
	if (!row || row->slot != found.slot || version & 1) /* odd: whom this program interrupted is writing */
		return t;
	cached->version = version + 1;
	RELOAD();
	cached->cgroup = cgroup;
	cached->port = port;
	cached->slot = found.slot;
	cached->generation = found.generation;
	RELOAD();
	cached->version = version + 2;
	return t;
}

#define LONG_LIVED 32

/*
 * Accepted connections keep no storage until LONG_LIVED packets have come: to make and free it is most of what a short
 * one would pay, and where thousands are idle it would be most of a node's. Workload and local port say which row; it
 * is there since the listener's first packet. What connect() or adopt() gave storage never comes here. Returns 0 where
 * there is no row.
 *
 * A look into the table is saved by what this CPU found last. A program on the same CPU can interrupt this one and
 * write there, hence the version: odd while it is written, another one afterwards.
 */
INLINE int count_accepted(struct __sk_buff *skb, struct bpf_sock *sk, int out)
{
	struct bpf_tcp_sock *tcp;
	struct inbound *cached;
	struct traffic *t = 0;
	u32 index, version;
	u64 cgroup;
	u16 port;

	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->protocol != PROTO_TCP || sk->type == SOCKET_RAW || sk->state == STATE_LISTEN)
		return 0;
	cgroup = bpf_skb_cgroup_id(skb);
	port = sk->src_port;
	index = (cgroup ^ port) & (INBOUND_CACHE - 1);
	cached = bpf_map_lookup_elem(MAP(INBOUND), &index);
	if (!cached)
		return 0;
	version = cached->version;
	RELOAD();
	if (!(version & 1) && cached->cgroup == cgroup && cached->port == port) {
		t = stripe(cached->slot, cached->generation, stride());
		RELOAD();
		if (cached->version != version)
			t = 0;
	}
	if (!t)
		t = find_inbound(cgroup, port, cached);
	if (!t)
		return 0;
	count_packet(skb, t, out);
	tcp = bpf_tcp_sock(sk);
	if (tcp && tcp->segs_in >= LONG_LIVED)
		new_accepted(sk, port);
	return 1;
}

/* The same for an accepted connection whose row is not there: its listener is older than the agent and idle, or gone. */
INLINE int make_accepted_row(struct __sk_buff *skb, struct bpf_sock *sk, int out)
{
	struct flow_key key = {};
	struct flow_row row = {};
	struct traffic *t;

	inbound_key(bpf_skb_cgroup_id(skb), sk->src_port, &key);
	if (take_slot(MAP(FREE_SLOTS), &key, &row))
		return 0;
	t = stripe(row.slot, row.generation, stride());
	if (t)
		count_packet(skb, t, out);
	return 1;
}

/*
 * A socket that no hook of ours has seen before: older than the agent, or a UDP server's. Its process is unknown.
 * 0 = it is not ours, or keeps no storage, and the packet was counted.
 */
INLINE struct socket *adopt(struct __sk_buff *skb, struct bpf_sock *sk, const struct packet *p, int out)
{
	u32 state = sk->state;
	int accepted = 0, connected;
	struct socket *s;

	if (p->transport == PROTO_TCP) {
		if (sk->type == SOCKET_RAW) /* the kernel's own, for a RST without a socket */
			return 0;
		accepted = state != STATE_LISTEN && state != STATE_CLOSE && state != STATE_SYN_SENT &&
			   has_listener(skb, sk, p, out);
		if (accepted && make_accepted_row(skb, sk, out))
			return 0;
	}
	s = new_socket(sk);
	if (!s)
		return 0;
	s->cookie = socket_cookie(skb);
	s->transport = p->transport;
	s->local_port = sk->src_port;
	copy16(s->local, out ? p->source : p->dest);
	connected = connected_peer(sk, s);
	if (!connected) {
		copy16(s->peer, out ? p->dest : p->source);
		s->peer_port = out ? p->dest_port : p->source_port;
	}
	s->role = out || connected ? ROLE_CLIENT : ROLE_SERVER;
	if (p->transport == PROTO_TCP) {
		/* Handshake packets run on the listening socket: its slot is the one of all that it will accept. */
		if (state == STATE_LISTEN)
			s->flags |= S_LISTENER;
		s->role = state == STATE_LISTEN || accepted ? ROLE_SERVER : ROLE_CLIENT;
		s->stage = s->role == ROLE_CLIENT ? STAGE_FIRST : STAGE_DONE;
	} else if (s->role == ROLE_CLIENT) {
		if (!connected)
			s->flags |= S_UNCONNECTED;
		if (p->transport == PROTO_UDP && s->peer_port == 53)
			s->stage = STAGE_DNS;
	}
	return s;
}

/* The socket has shown a name: it counts in that name's slot from here on. */
INLINE void named(struct socket *s, struct inspection *in, u64 evidence)
{
	u64 id = name_finish(in, evidence);

	if (s->name) /* a Host before: of a CONNECT, say. It is the stronger evidence */
		return;
	if (!bpf_map_lookup_elem(MAP(NAMES), &id) &&
	    bpf_map_update_elem(MAP(NAMES), &id, in->key.reversed, BPF_NOEXIST) &&
	    !bpf_map_lookup_elem(MAP(NAMES), &id)) {
		count_tally(LOST_NAME_TABLE);
		return;
	}
	if (bpf_map_lookup_elem(MAP(EXCLUDED_NAMES), &in->key))
		s->flags |= S_EXCLUDED;
	s->name = id;
	s->stride = 0;
}

/* What do these first bytes begin: a ClientHello, an HTTP request, or nothing that we read? `older`: than the agent. */
INLINE u8 classify(struct __sk_buff *skb, const struct packet *p, u8 stage, int older)
{
	u32 word = 0;

	if (p->length >= 4) {
		if (bpf_skb_load_bytes(skb, p->payload, &word, 4))
			return STAGE_DONE;
		if (is_method(word))
			return STAGE_HEAD;
		if (stage == STAGE_FIRST && word == FOUR('P', 'R', 'I', ' '))
			return STAGE_HTTP2;
	} else {
		if (bpf_skb_load_bytes(skb, p->payload, &word, 1))
			return STAGE_DONE;
		if (word >= 'A' && word <= 'Z')
			return STAGE_HEAD;
	}
	if (stage == STAGE_HTTP)
		return STAGE_HTTP;
	if (older && !(word & 0xff)) /* a frame of less than 64 KiB */
		return STAGE_MIDWAY;
	return (word & 0xff) == 0x16 ? STAGE_HELLO : STAGE_DONE;
}

/* Both return 1 when the name is read, or never will be. */
INLINE int inspect_hello(struct __sk_buff *skb, struct socket *s, struct inspection *in, struct parcel *parcel)
{
	hello_feed(in, skb);
	parcel->kind = RECORD_HELLO;
	parcel->offset = in->base;
	parcel->length = in->length;
	parcel->stream_offset = in->at;
	if (in->status == READING)
		return 0;
	if (in->status == READ_NAME)
		named(s, in, NAME_FROM_SNI);
	s->stage = STAGE_DONE;
	if (in->status == READ_FAILED || s->flags & S_EXCLUDED) {
		count_tally(in->status == READ_FAILED ? LOST_HELLO : FILTERED_TLS);
		parcel->flags = RECORD_ABANDONED;
		if (!in->at) /* no piece of it was told */
			parcel->length = 0;
		return 1;
	}
	s->stage = STAGE_HANDSHAKE;
	s->hello_start = in->start;
	s->hello_end = in->start + in->end;
	if (in->at + in->length < in->end)
		return 1;
	parcel->flags = RECORD_HEAD_END;
	/* Most of a long hello is the key share: copying it would cost more than reading the name did. */
	if (in->cut && !in->at && in->cut <= CUT_PART && in->length > in->cut_end && in->length - in->cut_end <= CUT_PART) {
		parcel->cut = in->cut;
		parcel->cut_end = in->cut_end;
	}
	return 1;
}

/*
 * What the client sends once its ClientHello was read for a name: the rest of the hello; early data, or a second hello
 * after a HelloRetryRequest, which are nothing to us; and, once the server has answered, the end of the handshake.
 */
INLINE void handshake_out(struct socket *s, const struct packet *p, struct parcel *parcel)
{
	u32 end = p->seq + p->length;

	if ((s32)(end - s->inspected) <= 0) /* sent again */
		return;
	parcel->offset = p->payload;
	if ((s32)(s->hello_end - s->inspected) > 0) {
		parcel->kind = RECORD_HELLO;
		parcel->length = p->length;
		parcel->stream_offset = p->seq - s->hello_start;
		if ((s32)(s->hello_end - end) <= 0)
			parcel->flags = RECORD_HEAD_END;
	} else if (s->stage == STAGE_ANSWERED) {
		parcel->kind = RECORD_HANDSHAKE_END;
		parcel->length = p->length < ROOM_SMALL ? p->length : ROOM_SMALL;
		s->stage = STAGE_DONE;
	}
	s->inspected = end;
}

#define RETRY_RANDOM 0x74ad21cf /* how the random of a HelloRetryRequest begins (RFC 8446 section 4.1.3) */

/* The server's first flight: what begins with a ServerHello or an alert. All else is its rest, out of order. */
INLINE void handshake_in(struct __sk_buff *skb, struct socket *s, const struct packet *p, struct parcel *parcel)
{
	u8 start[8];
	u32 random = 0;

	if (p->length < 7 || bpf_skb_load_bytes(skb, p->payload, start, 7) || start[1] != 3)
		return;
	if (start[0] == 0x15 && start[5] == 2) { /* fatal */
		s->stage = STAGE_DONE;
	} else if (start[0] == 0x15) { /* a warning: the ServerHello is behind it */
		if (p->length == 7)
			return;
		s->stage = STAGE_ANSWERED;
	} else if (start[0] == 0x16 && start[5] == 2) {
		if (bpf_skb_load_bytes(skb, p->payload + 11, &random, 4))
			return;
		if (random != RETRY_RANDOM) /* else the client starts again, and another first flight comes */
			s->stage = STAGE_ANSWERED;
	} else {
		return;
	}
	parcel->kind = RECORD_SERVER_HELLO;
	parcel->offset = p->payload;
	parcel->length = p->length < ROOM_MEDIUM ? p->length : ROOM_MEDIUM;
}

INLINE int inspect_head(struct __sk_buff *skb, struct socket *s, struct inspection *in, struct parcel *parcel)
{
	u32 old = in->next, seen = old - in->at;

	if (seen >= in->length) /* sent again */
		return 0;
	head_feed(in, skb);
	in->next = in->at + in->length;
	if (in->status == READ_NAME) {
		in->status = READ_NO_NAME;
		named(s, in, NAME_FROM_HOST);
	}
	parcel->kind = RECORD_HEAD;
	parcel->sequence = s->requests;
	parcel->offset = in->base + seen;
	parcel->length = in->length - seen;
	parcel->stream_offset = old;
	parcel->flags = in->ended ? RECORD_HEAD_END : 0;
	if (!in->ended && in->next < HEAD_LIMIT)
		return 0;
	if (in->tunnel) { /* what follows the proxy's answer is another first */
		s->stage = STAGE_FIRST;
		s->flags |= S_PROXIED;
	} else {
		s->stage = STAGE_HTTP;
	}
	return 1;
}

/* The first byte of an HTTP/1 request is about to leave; egress runs under the socket's lock. */
INLINE void request_begins(struct socket *s, const struct packet *p)
{
	if (UNLIKELY(s->more))
		tell_received(s, 0);
	if (s->requests == s->answers) /* else it is pipelined: where its answer begins is known when the one before has come */
		s->answer_start = p->ack;
	s->requests += 1;
	s->request_start = s->sent_to = p->seq;
	s->flags |= S_HTTP;
}

INLINE void copy_inspection(struct inspection *to, const struct inspection *from)
{
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < sizeof(*to) / 4; i++)
		((u32 *)to)[i] = ((const u32 *)from)[i];
}

/*
 * Read a segment for a name, in borrowed memory; most hellos and heads end with the first. Where more must follow the
 * state moves to socket storage, which costs more to make than all the reading. Per-CPU memory would not do: a
 * program on the same CPU can interrupt this one and overwrite it.
 */
INLINE void inspect(struct __sk_buff *skb, struct bpf_sock *sk, struct socket *s, const struct packet *p,
		    struct parcel *parcel)
{
	struct inspection *in, *kept = 0;
	u32 index;
	int done;

	if (UNLIKELY(s->flags & S_EXCLUDED)) {
		s->stage = STAGE_DONE;
		return;
	}
	if (s->stage == STAGE_FIRST || s->stage == STAGE_HTTP) {
		/* a request sent again is no second request */
		if (s->flags & S_INSPECTED && (s32)(p->seq + p->length - s->inspected) <= 0)
			return;
		s->stage = s->upgraded ? STAGE_DONE : classify(skb, p, s->stage, !s->opened_ns);
		if (s->stage == STAGE_DONE || s->stage == STAGE_HELLO)
			s->flags &= ~S_HTTP; /* after an upgrade or a CONNECT */
		if (s->stage == STAGE_HTTP2 || s->stage == STAGE_MIDWAY)
			begin_http2(sk, s, p->seq, s->stage == STAGE_MIDWAY);
		if (s->stage == STAGE_HEAD)
			request_begins(s, p);
		else if (s->stage != STAGE_HELLO)
			return;
	} else {
		kept = bpf_sk_storage_get(MAP(INSPECTIONS), sk, 0, 0);
		if (!kept) {
			s->stage = STAGE_DONE;
			return;
		}
	}
	in = borrow_scratch(&index);
	if (!in) {
		s->stage = STAGE_DONE;
		return;
	}
	if (kept) {
		copy_inspection(in, kept);
	} else {
		__builtin_memset(&in->key, 0, sizeof(in->key));
		__builtin_memset(&in->start, 0, (void *)in->carry - (void *)&in->start);
		*(u64 *)in->piece = 0;
		in->start = p->seq;
	}
	s->inspected = p->seq + p->length;
	s->flags |= S_INSPECTED;
	if (!(s->flags & S_CONNECTING)) /* a SYN has more options than what follows */
		s->bare = skb->len - p->length;
	/*
	 * From here on the segment is described in map memory alone. In registers the verifier would go on with the
	 * bounds of each of the dozens of paths that lead here, and verify the rest once for each.
	 */
	in->base = p->payload;
	in->length = p->length;
	in->at = p->seq - in->start;
	RELOAD();
	done = s->stage == STAGE_HELLO ? inspect_hello(skb, s, in, parcel) : inspect_head(skb, s, in, parcel);
	if (done) {
		bpf_sk_storage_delete(MAP(INSPECTIONS), sk);
	} else {
		/* asked for anew: `kept` alive until here would be two states of everything above to the verifier */
		kept = bpf_sk_storage_get(MAP(INSPECTIONS), sk, in, BPF_SK_STORAGE_GET_F_CREATE);
		if (kept)
			copy_inspection(kept, in);
		else
			s->stage = STAGE_DONE;
	}
	bpf_map_push_elem(MAP(FREE_SCRATCH), &index, 0);
}

/*
 * Does this segment to port 53 begin with a question (RFC 1035 sections 4.1.1 and 4.2.2)? Behind its length, which
 * some resolvers send by itself. A question fits into a segment; what does not look like one is another protocol.
 */
INLINE int like_question(struct __sk_buff *skb, struct socket *s, const struct packet *p)
{
	u32 prefixed = s->flags & S_INSPECTED; /* by the segment before */
	u8 start[8];

	s->flags &= ~S_INSPECTED;
	if (p->length <= 2) {
		s->flags |= S_INSPECTED;
		s->inspected = p->seq + p->length;
		return 1;
	}
	if (p->length < 8 || bpf_skb_load_bytes(skb, p->payload, start, 8))
		return 0;
	if (prefixed && !(start[2] & 0xf8) && !start[4] && start[5] == 1)
		return 1;
	return (start[0] << 8 | start[1]) + 2 <= p->length && !(start[4] & 0xf8) && !start[6] && start[7] == 1;
}

#define QUIC_SMALLEST 1200 /* RFC 9000 section 14.1: a client's datagram with an Initial packet has no fewer bytes */
#define QUIC_DATAGRAMS 3   /* a post-quantum ClientHello needs two, and one may be sent again */

/* The first datagrams to a peer: QUIC's Initial packets (RFC 9000 section 17.2.2, RFC 9369 section 3) are told. */
INLINE void inspect_datagram(struct __sk_buff *skb, struct socket *s, const struct packet *p, struct parcel *parcel)
{
	u64 start = 0;
	u32 version;

	s->stage = STAGE_DONE;
	if (s->flags & S_EXCLUDED || p->length < QUIC_SMALLEST || bpf_skb_load_bytes(skb, p->payload, &start, 8))
		return;
	version = start >> 8;
	if (!((start & 0xf0) == 0xc0 && version == bpf_htonl(1)) &&
	    !((start & 0xf0) == 0xd0 && version == bpf_htonl(0x6b3343cf)))
		return;
	parcel->kind = RECORD_QUIC_INITIAL;
	parcel->offset = p->payload;
	parcel->length = p->length;
	s->inspected += 1;
	if (s->inspected < QUIC_DATAGRAMS)
		s->stage = STAGE_QUIC;
}

INLINE void tell_datagram(struct socket *s)
{
	s->flags |= S_TOLD;
	if (s->stage != STAGE_DNS)
		tell_end(s, RECORD_OPENED, OUTCOME_OK, 0, bpf_ktime_get_ns(), 0);
}

/* The first packet that knows the socket's own cgroup: connect() knew the task's, accept() none. */
INLINE void set_workload(struct __sk_buff *skb, struct socket *s)
{
	u64 cgroup = bpf_skb_cgroup_id(skb);

	if (s->cgroup != cgroup) {
		s->cgroup = cgroup;
		s->stride = 0;
	}
}

INLINE struct traffic *counters_of(struct socket *s, int *created)
{
	struct traffic *t = LIKELY(s->stride) ? stripe(s->slot, s->generation, s->stride) : 0;
	struct connections *c;

	if (LIKELY(t))
		return t;
	*created = locate(s);
	if (s->role == ROLE_SERVER && s->flags & S_OPEN) {
		s->flags &= ~S_OPEN;
		c = bpf_map_lookup_elem(MAP(CONNECTIONS), &s->slot);
		if (c)
			ADD(c->opened, 1);
	}
	return stripe(s->slot, s->generation, s->stride);
}

/* Where the socket is, as it says itself; what a packet says is the same, and costs a look at the packet. */
INLINE void set_local(struct socket *s, struct bpf_sock *sk)
{
	s->local_port = sk->src_port;
	if (sk->family == 2) {
		set_v4(s->local, sk->src_ip4);
	} else {
		((u32 *)s->local)[0] = sk->src_ip6[0];
		((u32 *)s->local)[1] = sk->src_ip6[1];
		((u32 *)s->local)[2] = sk->src_ip6[2];
		((u32 *)s->local)[3] = sk->src_ip6[3];
	}
}

/*
 * Where a packet goes is known only now: NAT has rewritten it, the socket has not heard of it. A REDIRECT rule, as a
 * mesh has for its sidecars, turns what is meant for another host to the loopback device's address.
 */
INLINE void look_for_redirect(struct __sk_buff *skb, struct socket *s)
{
	u32 to[4] = {};
	int turned;

	if (s->scope == SCOPE_LOOPBACK || s->role != ROLE_CLIENT)
		return;
	if (skb->protocol == bpf_htons(0x0800))
		turned = !bpf_skb_load_bytes(skb, 16, to, 4) && (to[0] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	else
		turned = !bpf_skb_load_bytes(skb, 24, to, 16) && !(to[0] | to[1] | to[2]) && to[3] == bpf_htonl(1);
	s->flags = turned ? s->flags | S_REDIRECTED : s->flags & ~S_REDIRECTED;
}

#define SYN_AT_MOST 120 /* IPv6 header and a full TCP header: a longer SYN carries data (TCP Fast Open) */

/* Ends the program, unless the other one is missing. */
INLINE void frames_out(struct __sk_buff *skb, struct socket *s)
{
	tail_call(skb, MAP(FRAMES_OUT), 0);
	s->stage = STAGE_DONE;
	s->flags &= ~S_HTTP2;
}

INLINE int packet_out_slow(struct __sk_buff *skb, struct bpf_sock *sk, struct socket *s)
{
	struct packet p = {};
	struct parcel parcel = {};
	struct bpf_sock *full = 0;
	struct traffic *t;
	int created = 0;

	if (UNLIKELY(!s || !s->stride || s->flags & S_RETURN)) {
		full = bpf_sk_fullsock(sk);
		if (!full)
			return 1;
	}
	if (!s || !(s->flags & S_CONNECTING) || skb->len > SYN_AT_MOST) {
		if (UNLIKELY(parse(skb, &p)))
			return 1;
		if (UNLIKELY(!s))
			s = full ? adopt(skb, full, &p, OUT) : 0;
		if (!s)
			return 1;
	}
	if (UNLIKELY(full && !s->stride)) {
		set_workload(skb, s);
		set_local(s, full);
		if (s->transport != PROTO_TCP) /* an unconnected socket has no address of its own */
			copy16(s->local, p.source);
	}
	if (UNLIKELY(full && s->flags & S_RETURN && !(s->flags & S_DETOUR))) {
		connected_peer(full, s);
		s->flags &= ~(S_RETURN | S_DESCRIBED);
		s->stage = s->peer_port == 53 ? STAGE_DNS : STAGE_DONE;
		s->stride = 0;
	}
	if (UNLIKELY(!(s->flags & S_DESCRIBED)))
		describe(s);
	if (UNLIKELY(!s->stride))
		look_for_redirect(skb, s);
	if (s->stage == STAGE_DNS && p.length && p.transport == PROTO_TCP && !like_question(skb, s, &p))
		s->stage = STAGE_FIRST;
	if (s->stage == STAGE_DNS) {
		parcel.kind = RECORD_DNS_QUERY;
		parcel.offset = p.payload;
		parcel.length = p.length;
		parcel.stream_offset = p.seq;
	} else if (s->stage == STAGE_QUIC) {
		inspect_datagram(skb, s, &p, &parcel);
	} else if (s->stage && s->stage != STAGE_HTTP2 && p.length && p.transport == PROTO_TCP) {
		if (s->stage == STAGE_HANDSHAKE || s->stage == STAGE_ANSWERED)
			handshake_out(s, &p, &parcel);
		else
			inspect(skb, sk, s, &p, &parcel);
		if ((s32)(p.seq + p.length - s->sent_to) > 0)
			s->sent_to = p.seq + p.length;
	}
	ship(skb, s, &parcel);
	t = counters_of(s, &created);
	if (t)
		count_packet(skb, t, OUT);
	s->tx_bytes += skb->len;
	if (s->transport == PROTO_UDP && s->role == ROLE_CLIENT && (created || !(s->flags & S_TOLD)))
		tell_datagram(s);
	if (s->flags & S_DETOUR)
		s->flags = (s->flags & ~S_DETOUR) | S_RETURN;
	if (s->stage == STAGE_HTTP2)
		frames_out(skb, s);
	return 1;
}

/*
 * The next request on a connection whose name is known, with its head to the end in this segment, as most are: there is
 * nothing to read in it. What ends in an empty line has an empty line. What follows a CONNECT's head is not HTTP. By
 * itself it is half of the code that packet_out_slow() would run, and fetching code that an application has driven out
 * of the CPU's caches is what a request pays most. Returns 0 where it is anything else, and nothing was done.
 */
INLINE int next_request(struct __sk_buff *skb, struct socket *s)
{
	struct traffic *t = stripe(s->slot, s->generation, s->stride);
	struct parcel parcel = {};
	struct packet p;
	u32 word;

	if (UNLIKELY(!t || !s->name || s->upgraded || s->flags & S_EXCLUDED || plain(skb, &p) || p.length <= 4 ||
		     (s32)(p.seq + p.length - s->inspected) <= 0))
		return 0;
	if (UNLIKELY(bpf_skb_load_bytes(skb, p.payload, &word, 4) || !is_method(word) || word == FOUR('C', 'O', 'N', 'N')))
		return 0;
	if (UNLIKELY(bpf_skb_load_bytes(skb, p.payload + p.length - 4, &word, 4) ||
		     word != FOUR('\r', '\n', '\r', '\n')))
		return 0;
	request_begins(s, &p);
	s->inspected = s->sent_to = p.seq + p.length;
	parcel.kind = RECORD_HEAD;
	parcel.sequence = s->requests;
	parcel.offset = p.payload;
	parcel.length = p.length;
	parcel.flags = RECORD_HEAD_END;
	ship(skb, s, &parcel);
	count_packet(skb, t, OUT);
	s->tx_bytes += skb->len;
	return 1;
}

INLINE int packet_out(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct traffic *t;
	struct socket *s;

	if (!sk)
		return 1;
	s = known_socket(sk);
	if (LIKELY(s && (s->stage == STAGE_DONE || skb->len <= s->bare) && s->stride &&
		   !(s->flags & (S_DETOUR | S_RETURN)))) {
		t = stripe(s->slot, s->generation, s->stride);
		if (LIKELY(t)) {
			count_packet(skb, t, OUT);
			s->tx_bytes += skb->len;
			return 1;
		}
	}
	if (LIKELY(s && s->stage == STAGE_HTTP && s->stride && next_request(skb, s)))
		return 1;
	if (s && s->stage == STAGE_HTTP2 && s->stride) {
		t = stripe(s->slot, s->generation, s->stride);
		if (t) {
			count_packet(skb, t, OUT);
			s->tx_bytes += skb->len;
			frames_out(skb, s);
			return 1;
		}
	}
	if (!s && count_accepted(skb, sk, OUT))
		return 1;
	return packet_out_slow(skb, sk, s);
}

/* The row of whoever sent the packet, if the socket asked them. */
INLINE struct traffic *counters_of_sender(struct socket *s, const struct packet *p)
{
	struct destination *found = destination_of(p->source);
	struct flow_key key = {};
	struct flow_row *row;

	key.cgroup = s->cgroup;
	key.transport = s->transport;
	key.role = s->role;
	key.scope = found ? found->scope : SCOPE_INTERNET;
	if (found && found->excluded) {
		key.kind = FLOW_EXCLUDED;
	} else {
		key.port = p->source_port;
		key.redirected = !!(s->flags & S_REDIRECTED);
		copy16(key.peer, p->source);
	}
	row = bpf_map_lookup_elem(MAP(FLOWS), &key);
	return row ? stripe(row->slot, row->generation, stride()) : 0;
}

INLINE int from_peer(const struct socket *s, const struct packet *p)
{
	return s->peer_port == p->source_port && same16(s->peer, p->source);
}

/*
 * Where an answer to a socket with several peers counts. The socket's peer and slot are the last datagram's, and
 * sendmsg() may be changing them while this packet comes in: they are good where the peer is the sender both before
 * and after the slot was read. Else the sender's row is looked up.
 */
INLINE struct traffic *counters_of_answer(struct socket *s, const struct packet *p)
{
	struct traffic *t;

	if (s->stride && !(s->flags & (S_DETOUR | S_RETURN)) && from_peer(s, p)) {
		t = stripe(s->slot, s->generation, s->stride);
		RELOAD();
		if (t && s->stride && from_peer(s, p))
			return t;
	}
	return counters_of_sender(s, p);
}

/* Does a chunked body end with this packet? It may be the body of another kind that ends so; userspace knows. */
INLINE int last_chunk(struct __sk_buff *skb, const struct packet *p)
{
	u64 tail = 0;

	if (p->length < LAST_CHUNK || bpf_skb_load_bytes(skb, p->payload + p->length - LAST_CHUNK, &tail, LAST_CHUNK))
		return 0;
	return is_last_chunk(tail);
}

/*
 * A packet with payload on a connection that has sent an HTTP/1 request: the first bytes of a response go up, of the
 * rest only how much came and when. Ingress runs before TCP has put packets in order and dropped what came twice.
 */
INLINE void inspect_answer(struct __sk_buff *skb, struct socket *s, const struct packet *p, struct parcel *parcel)
{
	u32 end = p->seq + p->length;
	struct received received;
	s32 fresh = end - s->received_to;

	if (LIKELY(s->requests != s->answers)) {
		if (UNLIKELY(p->seq != s->answer_start))
			return; /* what is missing before it will be sent again, and so will this or be counted then */
		parcel->kind = RECORD_RESPONSE;
		parcel->offset = p->payload;
		parcel->length = p->length > ROOM_LARGE ? ROOM_LARGE : p->length;
		parcel->flags = p->length > ROOM_LARGE ? RECORD_TRUNCATED : 0;
		parcel->stream_offset = p->seq;
		parcel->sequence = s->answers + 1;
		parcel->sent = s->sent_to - s->request_start;
		parcel->received = p->length;
		s->answer_start = s->received_to = end;
		s->response_bytes = p->length;
		return;
	}
	if (fresh <= 0)
		return;
	s->received_to = end;
	s->response_bytes += fresh;
	s->response_ns = bpf_ktime_get_ns();
	s->more = 1;
	if (last_chunk(skb, p)) {
		tell_received(s, RECORD_LAST_CHUNK);
	} else if (p->tcp_flags & TCP_FLAG_PSH) { /* the last packet of what the server wrote has it */
		received.bytes = s->response_bytes;
		received.last_ns = s->response_ns;
		bpf_map_update_elem(MAP(RECEIVED), &s->cookie, &received, BPF_ANY);
	}
}

/* The first bytes of a response have come. The final one follows an interim one; an upgrade ends HTTP. */
INLINE void answered(struct __sk_buff *skb, struct socket *s, const struct packet *p, const struct parcel *parcel)
{
	u32 status = parcel->status;

	if (UNLIKELY(!status)) /* no room for the record */
		bpf_skb_load_bytes(skb, p->payload + STATUS_AT, &status, 4);
	if (UNLIKELY(p->length >= STATUS_LINE && is_interim(status))) {
		if (!is_upgrade(status))
			return;
		s->upgraded = 1;
	}
	s->answers += 1;
}

/* What comes in on a connection that has sent an HTTP/1 request; by itself for the reason of next_request(). */
INLINE void answer_in(struct __sk_buff *skb, struct socket *s)
{
	struct parcel parcel = {};
	struct traffic *t;
	struct packet p;
	int created;

	if (UNLIKELY(parse(skb, &p)))
		return;
	if (LIKELY(p.length))
		inspect_answer(skb, s, &p, &parcel);
	ship(skb, s, &parcel);
	if (LIKELY(parcel.kind == RECORD_RESPONSE))
		answered(skb, s, &p, &parcel);
	t = counters_of(s, &created);
	if (t)
		count_packet(skb, t, IN);
	ADD(s->rx_bytes, skb->len);
}

INLINE int packet_in_slow(struct __sk_buff *skb, struct bpf_sock *sk, struct socket *s)
{
	struct packet p;
	struct parcel parcel = {};
	struct traffic *t = 0;
	int created = 0;

	if (UNLIKELY(parse(skb, &p)))
		return 1;
	if (UNLIKELY(!s)) {
		sk = bpf_sk_fullsock(sk);
		if (!sk)
			return 1;
		s = adopt(skb, sk, &p, IN);
		if (!s)
			return 1;
	}
	if (UNLIKELY(!s->stride))
		set_workload(skb, s);
	if (s->flags & S_CONNECTING && p.tcp_flags & TCP_FLAG_RST)
		s->flags |= S_RST;
	/* the stage is the last datagram's; who answers from port 53 was asked before */
	if (s->stage == STAGE_DNS || (p.transport == PROTO_UDP && p.source_port == 53 && s->role == ROLE_CLIENT)) {
		parcel.kind = RECORD_DNS_ANSWER;
		parcel.offset = p.payload;
		parcel.length = p.length;
		parcel.stream_offset = p.seq;
	} else if (s->stage == STAGE_HANDSHAKE) {
		handshake_in(skb, s, &p, &parcel);
	}
	ship(skb, s, &parcel);
	if (s->flags & (S_UNCONNECTED | S_DETOUR | S_RETURN))
		t = counters_of_answer(s, &p);
	if (!t)
		t = counters_of(s, &created);
	if (t)
		count_packet(skb, t, IN);
	ADD(s->rx_bytes, skb->len);
	if (s->flags & S_LISTENER)
		may_accept(s);
	if (s->flags & S_HTTP2)
		tail_call(skb, MAP(FRAMES_IN), 0);
	return 1;
}

INLINE int packet_in(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct traffic *t;
	struct socket *s;

	if (!sk)
		return 1;
	s = known_socket(sk);
	if (LIKELY(s && (s->stage < STAGE_DNS || skb->len <= s->bare) && s->stride &&
		   !(s->flags & (S_CONNECTING | S_UNCONNECTED | S_DETOUR | S_RETURN | S_HTTP | S_HTTP2)))) {
		t = stripe(s->slot, s->generation, s->stride);
		if (LIKELY(t)) {
			count_packet(skb, t, IN);
			ADD(s->rx_bytes, skb->len);
			if (s->flags & S_LISTENER)
				may_accept(s);
			return 1;
		}
	}
	if (LIKELY(s && (s->flags & (S_HTTP | S_HTTP2 | S_CONNECTING)) == S_HTTP)) {
		answer_in(skb, s);
		return 1;
	}
	if (s && s->flags & S_HTTP2 && s->stride) {
		t = stripe(s->slot, s->generation, s->stride);
		if (t) {
			count_packet(skb, t, IN);
			ADD(s->rx_bytes, skb->len);
			tail_call(skb, MAP(FRAMES_IN), 0);
			return 1;
		}
	}
	if (!s && count_accepted(skb, sk, IN))
		return 1;
	return packet_in_slow(skb, sk, s);
}

#endif
