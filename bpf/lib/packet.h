/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * From an IP packet to where its payload lies. IPv4 with options (RFC 791), IPv6 with extension headers (RFC 8200
 * section 4), TCP with options. A fragment other than the first has no ports and no payload for us.
 */
#ifndef EBFW_PACKET_H
#define EBFW_PACKET_H

#include "source.h"

#define PROTO_TCP 6
#define PROTO_UDP 17

#define TCP_FLAG_RST 4
#define TCP_FLAG_PSH 8

struct packet {
	u8 source[16];
	u8 dest[16];
	u16 source_port; /* host order, 0 where there are no ports */
	u16 dest_port;
	u8 transport;
	u8 tcp_flags;
	u32 seq;     /* TCP sequence number of the first payload byte */
	u32 ack;     /* and of the first byte that the sender waits for */
	u32 payload; /* offset of the payload from the start of the IP header */
	u32 length;  /* of the payload */
};

INLINE void map_v4(u8 *to, const u8 *v4)
{
	*(u64 *)to = 0;
	*(u16 *)(to + 8) = 0;
	*(u16 *)(to + 10) = 0xffff;
	*(u32 *)(to + 12) = *(const u32 *)v4;
}

#define IPV6_EXTENSIONS 8 /* more than this many is no packet of a sane sender */

INLINE int parse_packet(struct source *from, u32 total, struct packet *p)
{
	u8 ip[40] __attribute__((aligned(8)));
	u32 offset, nothing = forget();
	u8 next;

	__builtin_memset(p, 0, sizeof(*p));
	if (read_bytes(from, 0, ip, 20))
		return -1;
	if ((ip[0] >> 4) == 4) {
		offset = (ip[0] & 15) * 4;
		if (offset < 20)
			return -1;
		next = ip[9];
		map_v4(p->source, ip + 12);
		map_v4(p->dest, ip + 16);
		if ((ip[6] & 0x1f) || ip[7]) { /* fragment offset */
			p->transport = next;
			return 0;
		}
	} else if ((ip[0] >> 4) == 6) {
		if (read_bytes(from, 0, ip, 40))
			return -1;
		next = ip[6];
		offset = 40;
		__builtin_memcpy(p->source, ip + 8, 16);
		__builtin_memcpy(p->dest, ip + 24, 16);
#pragma clang loop unroll(disable)
		for (int i = 0; i < IPV6_EXTENSIONS; i++) {
			u32 advance = 8;

			/* hop-by-hop, routing, fragment, authentication, destination options, mobility, HIP, shim6 */
			if (next != 0 && next != 43 && next != 44 && next != 51 && next != 60 && next != 135 &&
			    next != 139 && next != 140)
				break;
			if (read_bytes(from, offset, ip, 8)) /* none is shorter */
				return -1;
			if (next == 44) {
				if (ip[2] || (ip[3] & 0xf8)) { /* fragment offset */
					p->transport = ip[0];
					return 0;
				}
			} else if (next == 51) { /* in 4-byte units, less 2 (RFC 4302) */
				advance = (ip[1] + 2) * 4;
			} else { /* in 8-byte units, less 1 */
				advance = (ip[1] + 1) * 8;
			}
			next = ip[0];
			offset += advance + nothing;
		}
	} else {
		return -1;
	}
	if (next == PROTO_TCP) {
		if (read_bytes(from, offset, ip, 14))
			return -1;
		p->source_port = ip[0] << 8 | ip[1];
		p->dest_port = ip[2] << 8 | ip[3];
		p->seq = (u32)ip[4] << 24 | ip[5] << 16 | ip[6] << 8 | ip[7];
		p->ack = (u32)ip[8] << 24 | ip[9] << 16 | ip[10] << 8 | ip[11];
		p->tcp_flags = ip[13];
		offset += (ip[12] >> 4) * 4;
	} else if (next == PROTO_UDP) {
		if (read_bytes(from, offset, ip, 8))
			return -1;
		p->source_port = ip[0] << 8 | ip[1];
		p->dest_port = ip[2] << 8 | ip[3];
		offset += 8;
	}
	p->payload = offset + nothing;
	p->length = (total > offset ? total - offset : 0) + nothing;
	p->transport = next + nothing;
	return 0;
}

/*
 * The same for what nearly all packets are: IPv4 without options or IPv6 without extension headers, TCP or UDP, where
 * the headers are in the packet's linear part, from `ip` to `end`. They are read where they lie; parse_packet() calls a
 * helper for each. Negative: it must be asked.
 */
INLINE int parse_plain(const u8 *ip, const u8 *end, u32 total, struct packet *p)
{
	u32 offset, nothing = forget();
	const u8 *next;
	u8 transport;

	if (ip + 40 > end)
		return -1;
	if (ip[0] == 0x45) {
		if ((ip[6] & 0x1f) || ip[7]) /* fragment offset */
			return -1;
		transport = ip[9];
		map_v4(p->source, ip + 12);
		map_v4(p->dest, ip + 16);
		offset = 20;
	} else if ((ip[0] >> 4) == 6 && ip + 60 <= end) {
		transport = ip[6];
		__builtin_memcpy(p->source, ip + 8, 16);
		__builtin_memcpy(p->dest, ip + 24, 16);
		offset = 40;
	} else {
		return -1;
	}
	next = ip + offset;
	p->source_port = __builtin_bswap16(*(const u16 *)next);
	p->dest_port = __builtin_bswap16(*(const u16 *)(next + 2));
	p->seq = p->ack = p->tcp_flags = 0;
	if (transport == PROTO_TCP) {
		p->seq = __builtin_bswap32(*(const u32 *)(next + 4));
		p->ack = __builtin_bswap32(*(const u32 *)(next + 8));
		p->tcp_flags = next[13];
		offset += (next[12] >> 4) * 4;
	} else if (transport == PROTO_UDP) {
		offset += 8;
	} else {
		return -1;
	}
	p->payload = offset + nothing;
	p->length = (total > offset ? total - offset : 0) + nothing;
	p->transport = transport + nothing;
	return 0;
}

#endif
