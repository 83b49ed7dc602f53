/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Who wants to go where: cgroup connect4/6 and sendmsg4/6, in the task that calls. The only place that knows the
 * process on every kernel, and the address that the application asked for, before any rewriter.
 * Nothing is told here: a connect() may come to nothing, and one on UDP sends nothing.
 */
#ifndef EBFW_CONNECT_H
#define EBFW_CONNECT_H

#include "tcp.h"

INLINE void remember_caller(struct socket *s)
{
	s->cgroup = bpf_get_current_cgroup_id(); /* the task's; the first packet brings the socket's own */
	s->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(s->comm, sizeof(s->comm));
}

INLINE void want_peer(struct socket *s, const u8 *peer, u16 port)
{
	s->stride = 0;
	RELOAD(); /* the slot is invalid before the peer is another: see counters_of_answer() */
	copy16(s->peer, peer);
	s->peer_port = port;
	s->flags &= ~(S_DESCRIBED | S_REDIRECTED);
	s->name = 0;
}

/* What datagrams to a new peer are looked at for. */
INLINE void first_datagram(struct socket *s)
{
	s->stage = s->peer_port == 53 ? STAGE_DNS : STAGE_QUIC;
	s->inspected = 0;
}

INLINE int want_connect(struct bpf_sock_addr *ctx, const u8 *peer)
{
	struct bpf_sock *sk = ctx->sk;
	u8 transport = ctx->protocol;
	struct socket *s;

	if (!sk || (transport != PROTO_TCP && transport != PROTO_UDP))
		return 1;
	s = new_socket(sk);
	if (!s)
		return 1;
	connect_ended(s, 0); /* a blocking connect() that failed without a SYN, and now the application tries again */
	remember_caller(s);
	want_peer(s, peer, bpf_ntohs(ctx->user_port));
	s->cookie = socket_cookie(ctx);
	s->transport = transport;
	s->role = ROLE_CLIENT;
	s->flags = 0;
	s->tx_bytes = s->rx_bytes = 0;
	s->bare = 0;
	s->retransmits = 0;
	s->began_ns = bpf_ktime_get_ns();
	if (transport == PROTO_TCP) {
		s->flags = S_CONNECTING;
		s->stage = s->peer_port == 53 ? STAGE_DNS : STAGE_FIRST;
	} else {
		first_datagram(s);
	}
	return 1;
}

INLINE int want_send(struct bpf_sock_addr *ctx, const u8 *peer)
{
	struct bpf_sock *sk = ctx->sk;
	u16 port = bpf_ntohs(ctx->user_port);
	struct socket *s;

	if (!sk || ctx->protocol != PROTO_UDP)
		return 1;
	s = new_socket(sk);
	if (!s || s->role == ROLE_SERVER) /* a server answers */
		return 1;
	if (!s->role) {
		s->role = ROLE_CLIENT;
		s->transport = PROTO_UDP;
		s->cookie = socket_cookie(ctx);
		remember_caller(s);
	}
	if (s->peer_port != port || !same16(s->peer, peer)) {
		want_peer(s, peer, port);
		first_datagram(s);
	}
	s->flags |= sk->dst_port ? S_DETOUR : S_UNCONNECTED;
	return 1;
}

#endif
