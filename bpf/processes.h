/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Programs that begin in the watched subtree (raw tracepoint sched_process_exec): the agent looks for TLS functions in
 * them, and wants to be there before the first request. Unlike RECORDS this ring wakes its reader each time; the one
 * who pays is a process that has just spent a millisecond in execve. Others pay for one look at their cgroup.
 */
#ifndef EBFW_PROCESSES_H
#define EBFW_PROCESSES_H

#include "maps.h"

INLINE int program_began(void)
{
	struct execution *e;

	if (!in_scope())
		return 0;
	e = bpf_ringbuf_reserve(MAP(EXECUTIONS), sizeof(*e), 0);
	if (!e) {
		count_tally(LOST_EXECUTION);
		return 0;
	}
	e->time_ns = bpf_ktime_get_ns();
	e->pid = bpf_get_current_pid_tgid() >> 32;
	e->pad = 0;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

#endif
