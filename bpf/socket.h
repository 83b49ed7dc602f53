/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * A socket's identity: role, peer, workload, and the slot in which its packets are counted. A flow key is hashed
 * once a socket, not once a packet.
 */
#ifndef EBFW_SOCKET_H
#define EBFW_SOCKET_H

#include "maps.h"
#include "lib/packet.h"

/* socket.flags */
#define S_CONNECTING 1   /* connect was called and has come to nothing yet */
#define S_SYN 2          /* a SYN left */
#define S_SYN_AGAIN 4    /* and again: nobody answered the first */
#define S_EXPIRED 8      /* the kernel gave up: its retransmission timer ran out */
#define S_RST 16         /* the answer to our SYN was a RST */
#define S_OPEN 32        /* handshake done, counted as opened */
#define S_EXCLUDED 64    /* matched `exclude`: counted, not told */
#define S_TOLD 128       /* UDP: its first datagram was told */
#define S_UNCONNECTED 256 /* UDP without a connected peer: answers are matched by their source */
#define S_DETOUR 512     /* UDP, connected: the next datagram has an address of its own */
#define S_RETURN 1024    /* and after it the connected peer counts again */
#define S_PROXIED 2048   /* behind a CONNECT */
#define S_HTTP2 32768    /* HTTP/2: what comes in is read, too */
#define S_INSPECTED 8192 /* socket.inspected is set */
#define S_HTTP 16384     /* an HTTP/1 request left: responses are looked for */
#define S_REDIRECTED 65536 /* packets for this peer leave for the loopback device */
#define S_LISTENER 131072 /* TCP, listening: what it accepts keeps no storage */
#define S_DESCRIBED 4096 /* scope and exclusion are decided for this peer */

/* socket.stage: what the next payload that leaves is looked at for */
enum stage {
	STAGE_DONE,  /* nothing: the fast path */
	STAGE_FIRST, /* the client's first bytes: TLS, HTTP or neither */
	STAGE_HELLO, /* the rest of a ClientHello */
	STAGE_HEAD,  /* the rest of an HTTP request head */
	STAGE_HTTP,  /* the next request on this connection */
	STAGE_HTTP2, /* frames, for as long as the connection lives */
	STAGE_MIDWAY, /* perhaps frames: the connection is older than the agent */
	STAGE_ANSWERED, /* TLS: what the client says to the server's first flight, the end of the handshake */
	STAGE_QUIC,     /* UDP: QUIC's Initial packets */
	/* from here on what comes in is looked at, too */
	STAGE_DNS,      /* port 53; over TCP as long as it looks like DNS */
	STAGE_HANDSHAKE, /* TLS: the rest of the ClientHello, and the server's first flight */
};

INLINE struct socket *known_socket(void *sk)
{
	return bpf_sk_storage_get(MAP(SOCKETS), sk, 0, 0);
}

INLINE struct socket *new_socket(void *sk)
{
	struct socket *s = bpf_sk_storage_get(MAP(SOCKETS), sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!s)
		count_tally(LOST_SOCKET);
	return s;
}

INLINE void copy16(void *to, const void *from)
{
	((u64 *)to)[0] = ((const u64 *)from)[0];
	((u64 *)to)[1] = ((const u64 *)from)[1];
}

INLINE int same16(const void *a, const void *b)
{
	return ((const u64 *)a)[0] == ((const u64 *)b)[0] && ((const u64 *)a)[1] == ((const u64 *)b)[1];
}

INLINE void set_v4(u8 *to, u32 v4)
{
	*(u64 *)to = 0;
	*(u32 *)(to + 8) = bpf_htonl(0xffff);
	*(u32 *)(to + 12) = v4;
}

/* Scope and exclusion of an address: one look-up in a trie. */
INLINE struct destination *destination_of(const u8 *address)
{
	struct address_key key = {.prefix_bits = 128};

	/* the address is 4 bytes into the key, and the stack must not be accessed misaligned */
	for (int i = 0; i < 4; i++)
		((u32 *)key.address)[i] = ((const u32 *)address)[i];
	return bpf_map_lookup_elem(MAP(DESTINATIONS), &key);
}

/* Once a socket and peer. */
INLINE void describe(struct socket *s)
{
	struct destination *found = destination_of(s->peer);

	s->scope = found ? found->scope : SCOPE_INTERNET;
	s->flags &= ~S_EXCLUDED;
	if (found && found->excluded)
		s->flags |= S_EXCLUDED;
	s->flags |= S_DESCRIBED;
}

/* A new row on a slot from one of the two stacks. 0 when it has one now. */
INLINE int take_slot(void *stack, const struct flow_key *key, struct flow_row *row)
{
	struct traffic *first;
	struct flow_row *other;

	if (bpf_map_pop_elem(stack, &row->slot))
		return -1;
	first = bpf_map_lookup_elem(MAP(TRAFFIC), &row->slot);
	if (!first)
		return -1;
	first->taken = 1;
	row->generation = first->generation;
	row->since_ns = bpf_ktime_get_ns();
	if (!bpf_map_update_elem(MAP(FLOWS), (void *)key, row, BPF_NOEXIST)) {
		count_tally(FLOWS_MADE);
		return 0;
	}
	/* another CPU was faster, or the table is full */
	first->taken = 0;
	bpf_map_push_elem(stack, &row->slot, 0);
	other = bpf_map_lookup_elem(MAP(FLOWS), (void *)key);
	if (!other)
		return -1;
	*row = *other;
	return 0;
}

INLINE void flow_key_of(const struct socket *s, struct flow_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->cgroup = s->cgroup;
	key->transport = s->transport;
	key->role = s->role;
	if (s->role == ROLE_SERVER) {
		key->kind = FLOW_INBOUND;
		key->port = s->local_port;
		return;
	}
	key->scope = s->scope;
	if (s->flags & S_EXCLUDED) {
		key->kind = FLOW_EXCLUDED;
		return;
	}
	key->port = s->peer_port;
	key->name = s->name;
	key->redirected = !!(s->flags & S_REDIRECTED);
	copy16(key->peer, s->peer);
}

/* The row of a key, made if need be; never without an answer. Returns 1 when the flow is new to the table. */
INLINE int find_row(struct flow_key *key, struct flow_row *row)
{
	struct flow_row *found = bpf_map_lookup_elem(MAP(FLOWS), key);

	if (found) {
		*row = *found;
		return 0;
	}
	if (!take_slot(MAP(FREE_SLOTS), key, row))
		return 1;
	count_tally(LOST_FLOW_TABLE);
	key->name = 0;
	key->port = 0;
	key->scope = 0;
	key->kind = FLOW_OTHER;
	__builtin_memset(key->peer, 0, sizeof(key->peer));
	found = bpf_map_lookup_elem(MAP(FLOWS), key);
	if (found) {
		*row = *found;
	} else if (take_slot(MAP(SPARE_SLOTS), key, row)) {
		count_tally(LOST_FLOW_OVERFLOW);
		row->slot = 0; /* the node-wide row, generation 0 for ever */
		row->generation = 0;
	}
	return 0;
}

INLINE u32 stride(void)
{
	u32 zero = 0;
	struct settings *settings = bpf_map_lookup_elem(MAP(SETTINGS), &zero);

	return settings ? settings->slots : 0;
}

/* Give the socket its slot. Returns 1 when its flow is new to the table. */
INLINE int locate(struct socket *s)
{
	struct flow_key key;
	struct flow_row row = {};
	int created;

	if (!(s->flags & S_DESCRIBED))
		describe(s);
	flow_key_of(s, &key);
	created = find_row(&key, &row);
	s->slot = row.slot;
	s->generation = row.generation;
	s->stride = stride();
	return created;
}

INLINE struct traffic *stripe(u32 slot, u32 generation, u32 slots)
{
	u32 index = slot + (bpf_get_smp_processor_id() & (STRIPES - 1)) * slots;
	struct traffic *t = bpf_map_lookup_elem(MAP(TRAFFIC), &index);

	return t && t->generation == generation ? t : 0;
}

INLINE struct connections *connections_of(struct socket *s)
{
	if (!s->stride)
		locate(s);
	return bpf_map_lookup_elem(MAP(CONNECTIONS), &s->slot);
}

#define ADD(field, n) __sync_fetch_and_add(&(field), (n))

#endif
