/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What an application hands to its TLS library, before it is encrypted: uprobes on OpenSSL's SSL_write and
 * SSL_write_ex, whose first three arguments are the same. Only the head of an HTTP request is taken; what a server
 * writes does not look like one. Scoped to the configured cgroup subtree here, in the kernel: a probe is on the
 * library's file, which every process on the host may share.
 */
#ifndef EBFW_TLS_H
#define EBFW_TLS_H

#include "records.h"
#include "lib/head.h"

/* The layout of struct pt_regs (x86-64) and struct user_pt_regs (arm64) as uprobes see it: ABI, not a header. */
#if defined(EBFW_ARCH_X86_64)
struct registers {
	u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
};
#define ARGUMENT2(regs) ((regs)->si)
#define ARGUMENT3(regs) ((regs)->dx)
#elif defined(EBFW_ARCH_AARCH64)
struct registers {
	u64 regs[31];
};
#define ARGUMENT2(regs) ((regs)->regs[1])
#define ARGUMENT3(regs) ((regs)->regs[2])
#else
#error "TLS probes know the registers of x86-64 and arm64 only"
#endif

#define SHIP_USER(room)                                                                                       \
	do {                                                                                                      \
		struct {                                                                                              \
			struct record head;                                                                               \
			u8 payload[room];                                                                                 \
		} *b = (void *)reserve_record(sizeof(*b));                                                            \
		u64 take = n - 1;                                                                                     \
                                                                                                              \
		if (!b)                                                                                               \
			return 0;                                                                                         \
		BOUND(take, (room) - 1);                                                                              \
		take += 1;                                                                                            \
		__builtin_memset(&b->head, 0, sizeof(b->head));                                                       \
		b->head.time_ns = bpf_ktime_get_ns();                                                                 \
		b->head.cgroup = bpf_get_current_cgroup_id();                                                         \
		b->head.pid = bpf_get_current_pid_tgid() >> 32;                                                       \
		bpf_get_current_comm(b->head.comm, sizeof(b->head.comm));                                             \
		b->head.kind = RECORD_TLS_WRITE;                                                                      \
		b->head.transport = PROTO_TCP;                                                                        \
		b->head.role = ROLE_CLIENT;                                                                           \
		b->head.length = take;                                                                                \
		b->head.flags = take < n ? RECORD_TRUNCATED : 0;                                                      \
		if (bpf_probe_read_user(b->payload, take, (void *)data)) {                                            \
			bpf_ringbuf_discard(b, BPF_RB_NO_WAKEUP);                                                         \
			return 0;                                                                                         \
		}                                                                                                     \
		bpf_ringbuf_submit(b, wakeup());                                                                      \
		return 0;                                                                                             \
	} while (0)

INLINE int tls_written(struct registers *regs)
{
	u64 data = ARGUMENT2(regs), n = ARGUMENT3(regs);
	u32 word = 0;

	if (bpf_current_task_under_cgroup(MAP(SCOPE), 0) != 1)
		return 0;
	if (n < 16 || n > 0x7fffffff || bpf_probe_read_user(&word, sizeof(word), (void *)data) || !is_method(word))
		return 0;
	if (n <= ROOM_MEDIUM)
		SHIP_USER(ROOM_MEDIUM);
	if (n <= ROOM_LARGE)
		SHIP_USER(ROOM_LARGE);
	SHIP_USER(ROOM_HUGE);
}

#endif
