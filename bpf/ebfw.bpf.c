/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Every entry point, in the order of a socket's life. The work is in the headers: bcc loses entry functions of
 * included files, and rewrites pointer accesses only here, which nothing in this file needs.
 *
 * Each program returns 1 (go on) whatever happens: this version observes.
 * EBFW_PART splits it in two halves that compile side by side, each about as long.
 * Where each is attached, and what is lost without it: exporter/kernel/probes.py.
 */
#include "wire.h"
#if EBFW_PART != 1
#include "connect.h"
#include "packets.h"
#endif
#if EBFW_PART != 2
#include "http2.h"
#include "tls.h"
#include "processes.h"
#endif

#if EBFW_PART != 1
int ebfw_connect4(struct bpf_sock_addr *ctx)
{
	u8 peer[16] __attribute__((aligned(8)));

	set_v4(peer, ctx->user_ip4);
	return want_connect(ctx, peer);
}

int ebfw_connect6(struct bpf_sock_addr *ctx)
{
	u32 peer[4] __attribute__((aligned(8))) = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
						   ctx->user_ip6[3]};

	return want_connect(ctx, (const u8 *)peer);
}

int ebfw_sendmsg4(struct bpf_sock_addr *ctx)
{
	u8 peer[16] __attribute__((aligned(8)));

	set_v4(peer, ctx->user_ip4);
	return want_send(ctx, peer);
}

int ebfw_sendmsg6(struct bpf_sock_addr *ctx)
{
	u32 peer[4] __attribute__((aligned(8))) = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
						   ctx->user_ip6[3]};

	return want_send(ctx, (const u8 *)peer);
}

int ebfw_sockops(struct bpf_sock_ops *ctx)
{
	return tcp_event(ctx);
}

int ebfw_egress(struct __sk_buff *skb)
{
	return packet_out(skb);
}

int ebfw_ingress(struct __sk_buff *skb)
{
	return packet_in(skb);
}

int ebfw_release(struct bpf_sock *ctx)
{
	return released(ctx);
}
#endif

#if EBFW_PART != 2
int ebfw_frames_out(struct __sk_buff *skb)
{
	return frames_packet(skb, OUT);
}

int ebfw_frames_in(struct __sk_buff *skb)
{
	return frames_packet(skb, IN);
}

int ebfw_ssl_write(struct registers *regs)
{
	tls_offers(ARGUMENT1(regs), ARGUMENT2(regs), ARGUMENT3(regs), 0);
	return 0;
}

int ebfw_ssl_write_ex(struct registers *regs)
{
	tls_offers(ARGUMENT1(regs), ARGUMENT2(regs), ARGUMENT3(regs), ARGUMENT4(regs));
	return 0;
}

int ebfw_ssl_write_return(struct registers *regs)
{
	tls_write_returns(regs, RESULT(regs));
	return 0;
}

int ebfw_frames_tls(struct registers *regs)
{
	frames_tls(regs);
	return 0;
}

int ebfw_ssl_read(struct registers *regs)
{
	/* only connections that have sent a request have a stream */
	if (tls_stream_of(ARGUMENT1(regs)))
		tls_asks(bpf_get_current_pid_tgid(), ARGUMENT1(regs), ARGUMENT2(regs), 0);
	return 0;
}

int ebfw_ssl_read_ex(struct registers *regs)
{
	if (tls_stream_of(ARGUMENT1(regs)))
		tls_asks(bpf_get_current_pid_tgid(), ARGUMENT1(regs), ARGUMENT2(regs), ARGUMENT4(regs));
	return 0;
}

int ebfw_ssl_read_return(struct registers *regs)
{
	tls_read_returns(regs, bpf_get_current_pid_tgid(), RESULT(regs));
	return 0;
}

int ebfw_ssl_free(struct registers *regs)
{
	tls_freed(ARGUMENT1(regs));
	return 0;
}

int ebfw_go_write(struct registers *regs)
{
	if (in_scope())
		tls_sends(regs, GO_ARGUMENT1(regs), GO_ARGUMENT2(regs), GO_ARGUMENT3(regs), bpf_ktime_get_ns());
	return 0;
}

int ebfw_go_read(struct registers *regs)
{
	/* net/http waits for the answer in one goroutine before the other has sent the request */
	if (in_scope())
		tls_asks(goroutine(GOROUTINE(regs)), GO_ARGUMENT1(regs), GO_ARGUMENT2(regs), 0);
	return 0;
}

int ebfw_go_read_return(struct registers *regs)
{
	tls_read_returns(regs, goroutine(GOROUTINE(regs)), GO_ARGUMENT1(regs));
	return 0;
}

int ebfw_go_close(struct registers *regs)
{
	tls_freed(GO_ARGUMENT1(regs));
	return 0;
}

int ebfw_exec(void *ctx)
{
	return program_began();
}
#endif
