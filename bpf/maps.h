/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Every map: key, value, who writes, who reads, what happens when it is full. The loader creates them (sizes and
 * flags: exporter/kernel/maps.py), not bcc: so they can be sized by the node, pinned, and adopted by a later agent.
 *
 * map              key               value                 written by           read by    when full
 * SETTINGS         0                 struct settings       agent, at start      kernel     -
 * SOCKETS          socket            struct socket         kernel               kernel     LOST_SOCKET
 * INSPECTIONS      socket            struct inspection     kernel               kernel     the flow stays unnamed
 * SCRATCH          index             union scratch         kernel               kernel     LOST_SCRATCH
 * FREE_SCRATCH     -                 index                 agent; kernel        kernel     holds every index
 * FLOWS            struct flow_key   struct flow_row       kernel; agent folds  both       LOST_FLOW_TABLE
 * TRAFFIC          slot, stripe      struct traffic        kernel               agent      one entry a slot
 * CONNECTIONS      slot              struct connections    kernel               agent      one entry a slot
 * FREE_SLOTS       -                 slot                  agent; kernel pops   kernel     holds every slot
 * SPARE_SLOTS      -                 slot                  agent; kernel pops   kernel     for ~other rows alone
 * NAMES            name id           struct name           kernel; agent prunes both       LOST_NAME_TABLE
 * DESTINATIONS     struct address_key struct destination   agent                kernel     refused at start
 * EXCLUDED_NAMES   struct name_key   u32                   agent                kernel     refused at start
 * TALLIES          enum tally        u64, one a CPU        kernel               agent      -
 * SCOPE            0                 cgroup                agent                kernel     -
 * RECORDS          (ring buffer)     struct record, bytes  kernel               agent      LOST_RING_FULL
 * RECEIVED         cookie            struct received       kernel               agent      LRU: the end of a response is
 *                                                                                          known with the next request
 * TLS_STREAMS      struct tls_key    struct tls_stream     kernel               kernel     LRU: a request has no answer
 * TLS_CALLS        thread            struct tls_call       kernel               kernel     LRU: the same
 * EXECUTIONS       (ring buffer)     struct execution      kernel               agent      LOST_EXECUTION
 * HTTP2            socket            struct http2          kernel               kernel     LOST_SOCKET
 * TLS_HTTP2        struct tls_key    struct http2          kernel               kernel     LRU: the connection is met anew
 * ACCEPTING        0                 struct accepting      kernel               kernel     one a CPU
 * INBOUND          cgroup, port      struct inbound        kernel               kernel     by CPU: another takes its place
 * FRAMES_*         0                 program               agent, at start      kernel     -
 *
 * No counter lives in an LRU map: LRU evicts without a signal, and a total would fall.
 */
#ifndef EBFW_MAPS_H
#define EBFW_MAPS_H

#include "wire.h"

#define MAP(name) ((void *)bpf_pseudo_fd(1, MAP_##name))

#include "lib/source.h"

/* bcc 0.26 declares this helper with a 32-bit result and cuts the cookie in half. */
static u64 (*socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

INLINE void count_tally(u32 which)
{
	u64 *value = bpf_map_lookup_elem(MAP(TALLIES), &which);

	if (value)
		*value += 1;
}

/* Is the task that runs in the watched subtree? For what sits on tasks, not on the cgroup. */
INLINE bool in_scope(void)
{
	return bpf_current_task_under_cgroup(MAP(SCOPE), 0) == 1;
}

/* Memory for a while: its index goes back to FREE_SCRATCH. 0 = none is free. */
INLINE void *borrow_scratch(u32 *index)
{
	if (bpf_map_pop_elem(MAP(FREE_SCRATCH), index)) {
		count_tally(LOST_SCRATCH);
		return 0;
	}
	return bpf_map_lookup_elem(MAP(SCRATCH), index);
}

#endif
