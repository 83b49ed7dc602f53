/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * A TCP connection's life: how the handshake ended and how long it took, retransmits, RTT, close. From sock_ops
 * callbacks and sock_release.
 *
 * How a handshake failed, told apart: `refused`, a RST came in (seen at ingress); `timed_out`, the SYN went out
 * again and either the kernel's timer ran out (RTO callback with its third argument set) or the application gave up;
 * `cancelled`, closed before a second SYN; `unreachable`, no SYN ever left, or the kernel ended the attempt itself
 * without RST or timer: an ICMP error.
 */
#ifndef EBFW_TCP_H
#define EBFW_TCP_H

#include "records.h"

/* struct bpf_sock.state and the arguments of BPF_SOCK_OPS_STATE_CB */
#define STATE_ESTABLISHED 1
#define STATE_SYN_SENT 2
#define STATE_FIN_WAIT1 4
#define STATE_CLOSE 7
#define STATE_CLOSE_WAIT 8
#define STATE_LISTEN 10

/* `since`, `now`: CLOCK_MONOTONIC ns; 0 = no duration. */
INLINE void tell_end(struct socket *s, u8 kind, u8 outcome, u64 since, u64 now, u32 rtt_us)
{
	struct record *r;

	if (s->flags & S_EXCLUDED) {
		count_tally(kind == RECORD_CLOSED ? FILTERED_CLOSE : FILTERED_CONNECT);
		/* Who speaks OTLP must be known, and Collectors mostly have addresses that are excluded: the agent learns
		 * of the connection, and tells nobody. */
		if (kind != RECORD_OPENED || (s->peer_port != 4317 && s->peer_port != 4318))
			return;
	}
	r = reserve_record(sizeof(*r));
	if (!r)
		return;
	fill_record(r, s, kind, now);
	if (s->flags & S_EXCLUDED)
		r->flags |= RECORD_EXCLUDED;
	r->outcome = outcome;
	r->duration_ns = since ? now - since : 0;
	r->tx_bytes = s->tx_bytes;
	r->rx_bytes = s->rx_bytes;
	r->retransmits = s->retransmits;
	r->rtt_us = rtt_us;
	bpf_ringbuf_submit(r, wakeup());
}

/* A connection attempt is over and did not succeed. `kernel_ended`: by the kernel, not by the application. */
INLINE void connect_ended(struct socket *s, int kernel_ended)
{
	struct connections *c;
	u32 flags = s->flags;
	u8 outcome;

	if (!(flags & S_CONNECTING))
		return;
	s->flags = flags & ~S_CONNECTING;
	c = connections_of(s);
	if (flags & S_RST) {
		outcome = OUTCOME_REFUSED;
		if (c)
			ADD(c->refused, 1);
	} else if (!(flags & S_SYN) || (kernel_ended && !(flags & S_EXPIRED))) {
		outcome = OUTCOME_UNREACHABLE;
		if (c)
			ADD(c->unreachable, 1);
	} else if (flags & (S_SYN_AGAIN | S_EXPIRED)) {
		outcome = OUTCOME_TIMED_OUT;
		if (c)
			ADD(c->timed_out, 1);
	} else {
		outcome = OUTCOME_CANCELLED;
		if (c)
			ADD(c->cancelled, 1);
	}
	tell_end(s, RECORD_FAILED, outcome, s->began_ns, bpf_ktime_get_ns(), 0);
}

INLINE void opened(struct bpf_sock_ops *ctx, struct socket *s)
{
	struct connections *c;

	s->opened_ns = bpf_ktime_get_ns();
	s->flags = (s->flags & ~S_CONNECTING) | S_OPEN;
	c = connections_of(s);
	if (c)
		ADD(c->opened, 1);
	tell_end(s, RECORD_OPENED, OUTCOME_OK, s->began_ns, s->opened_ns, ctx->srtt_us >> 3);
}

/* Storage for an accepted connection; its first packet from here on finds the slot. */
INLINE struct socket *new_accepted(struct bpf_sock *sk, u16 port)
{
	struct socket *s = bpf_sk_storage_get(MAP(SOCKETS), sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!s) /* no loss where the flow table can be asked */
		return 0;
	s->role = ROLE_SERVER;
	s->transport = PROTO_TCP;
	s->local_port = port;
	s->stage = STAGE_DONE;
	s->flags = S_DESCRIBED;
	s->stride = 0;
	return s;
}

/* A packet has come in for a listening socket: it may complete a handshake. */
INLINE void may_accept(const struct socket *listener)
{
	u32 zero = 0;
	struct accepting *a = bpf_map_lookup_elem(MAP(ACCEPTING), &zero);

	if (!a)
		return;
	a->slot = listener->slot;
	a->port = listener->local_port;
}

/*
 * A handshake is done. This callback knows no workload, but the packet that completed the handshake does: it ran
 * through ingress, on the listening socket, right before, on this CPU, with bottom halves off in between. Where ingress
 * does not know the socket as listening (it has no storage, or was a client once) the connection gets storage, and is
 * counted as opened with its first packet from here on; one may have been here before us.
 */
INLINE void accepted(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	u32 zero = 0;
	struct accepting *a = bpf_map_lookup_elem(MAP(ACCEPTING), &zero);
	struct connections *c;
	struct socket *s;

	if (a && a->port && a->port == ctx->local_port) {
		a->port = 0;
		c = bpf_map_lookup_elem(MAP(CONNECTIONS), &a->slot);
		if (c)
			ADD(c->opened, 1);
		return;
	}
	s = new_accepted(sk, ctx->local_port);
	if (s)
		s->flags |= S_OPEN;
	else
		count_tally(LOST_SOCKET);
}

INLINE void connection_ended(struct bpf_sock_ops *ctx, struct socket *s)
{
	u32 before = ctx->args[0];
	struct connections *c;
	u8 outcome = OUTCOME_OK;

	if (before == STATE_SYN_SENT) {
		connect_ended(s, 1);
		return;
	}
	if (!(s->flags & S_OPEN))
		return;
	s->flags &= ~S_OPEN;
	/* an orderly end passes through FIN_WAIT2, CLOSING, TIME_WAIT or LAST_ACK */
	if (before == STATE_ESTABLISHED || before == STATE_CLOSE_WAIT || before == STATE_FIN_WAIT1)
		outcome = s->flags & S_EXPIRED ? OUTCOME_TIMED_OUT : OUTCOME_RESET;
	if (s->more)
		tell_received(s, 0);
	c = connections_of(s);
	if (c)
		ADD(c->closed, 1);
	tell_end(s, RECORD_CLOSED, outcome, s->opened_ns, bpf_ktime_get_ns(), ctx->srtt_us >> 3);
}

INLINE int tcp_event(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	u32 op = ctx->op;
	struct connections *c;
	struct socket *s;

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
	    op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_STATE_CB &&
	    op != BPF_SOCK_OPS_RTO_CB && op != BPF_SOCK_OPS_RETRANS_CB)
		return 1;
	if (!sk || (op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] != STATE_CLOSE))
		return 1;
	if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		accepted(ctx, sk);
		return 1;
	}
	s = known_socket(sk);
	if (!s || s->role != ROLE_CLIENT)
		return 1;
	switch (op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		s->flags |= S_SYN;
		bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG |
						       BPF_SOCK_OPS_RETRANS_CB_FLAG);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		opened(ctx, s);
		break;
	case BPF_SOCK_OPS_RTO_CB:
		if (ctx->args[2])
			s->flags |= S_EXPIRED;
		break;
	case BPF_SOCK_OPS_RETRANS_CB:
		if (s->flags & S_CONNECTING)
			s->flags |= S_SYN_AGAIN;
		s->retransmits += ctx->args[1];
		c = connections_of(s);
		if (c)
			ADD(c->retransmits, ctx->args[1]);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		connection_ended(ctx, s);
		break;
	}
	return 1;
}

/* The last reference from userspace is gone. Runs before the FIN, and before the state changes. */
INLINE int released(struct bpf_sock *ctx)
{
	struct socket *s = known_socket(ctx);

	if (s)
		connect_ended(s, 0);
	return 1;
}

#endif
