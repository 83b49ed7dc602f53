/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The server_name of a TLS ClientHello (RFC 8446 section 4.1.2, RFC 6066 section 3), however it is cut into
 * segments. Nothing is buffered but the item being read: the reader hops from length to length, so a hello may have
 * any size and the name may come last, behind a post-quantum key share. Not read: a hello cut into several TLS
 * records, and what ECH hides (the outer name is what is seen).
 */
#ifndef EBFW_HELLO_H
#define EBFW_HELLO_H

#include "name.h"

enum reading { READING, READ_NAME, READ_NO_NAME, READ_FAILED };

enum hello_item {
	HELLO_RECORD,      /* 6: content type, version, length, handshake type */
	HELLO_SESSION,     /* 1: length of the session id, at 43 */
	HELLO_CIPHERS,     /* 2: length */
	HELLO_COMPRESSION, /* 1: length */
	HELLO_EXTENSIONS,  /* 2: length of all */
	HELLO_EXTENSION,   /* 4: type, length */
	HELLO_SERVER_NAME, /* 5: list length, name type, name length */
	HELLO_NAME,        /* the name */
};

/* Items a segment may hold before we stop looking: the five before the extensions, the name, and 42 extensions. */
#define HELLO_STEPS 48

INLINE u32 be16(const u8 *b)
{
	return (u32)b[0] << 8 | b[1];
}

/* Sizes of the fixed items, four bits each, lowest first. */
#define HELLO_SIZES 0x05421216ULL

/*
 * One item, or what this segment has of it. Returns 0 to go on, 1 to stop until the next segment or for good
 * (in->status says which).
 *
 * All state is in map memory, none in registers that live across steps: the verifier then finds each turn of the
 * loop in the state of the turn before and prunes; with registers it walks 48! paths on 5.10.
 */
INLINE int hello_step(struct inspection *in, struct source *from)
{
	u32 item, position, left;
	u64 have, take, need;
	u8 *b = in->carry;

	RELOAD();
	item = in->item;
	have = in->carried;
	if (item == HELLO_NAME) {
		u64 offset;

		have = in->name_have;
		position = in->want + have - in->at;
		if (position >= in->length)
			return 1;
		left = in->length - position;
		need = in->name_length - have;
		take = need < left ? need : left;
		offset = have;
		BOUND(offset, 255);
		take -= 1;
		BOUND(take, 255);
		take += 1;
		if (read_bytes(from, in->base + position, in->text + offset, take)) {
			in->status = READ_FAILED;
			return 1;
		}
		in->name_have = have + take;
		if (in->name_have < in->name_length)
			return 1;
		if (in->text[(in->name_length - 1) & 255] == '.') /* not allowed (RFC 6066), and seen */
			in->name_length -= 1;
		in->status = in->name_length ? READ_NAME : READ_NO_NAME;
		return 1;
	}
	need = (HELLO_SIZES >> (item * 4)) & 15;
	position = in->want + have - in->at;
	if (position >= in->length)
		return 1;
	left = in->length - position;
	take = need - have;
	if (take > left)
		take = left;
	BOUND(have, 7);
	take -= 1;
	BOUND(take, 7);
	take += 1;
	if (read_bytes(from, in->base + position, b + have, take)) {
		in->status = READ_FAILED;
		return 1;
	}
	if (have + take < need) {
		in->carried = have + take;
		return 1;
	}
	in->carried = 0;
	if (item == HELLO_RECORD) {
		if (b[0] != 0x16 || b[1] != 3 || b[5] != 1) {
			in->status = READ_FAILED;
			return 1;
		}
		in->end = 5 + be16(b + 3);
		in->want = 43;
		in->item = HELLO_SESSION;
	} else if (item == HELLO_SESSION) {
		in->want += 1 + b[0];
		in->item = HELLO_CIPHERS;
	} else if (item == HELLO_CIPHERS) {
		in->want += 2 + be16(b);
		in->item = HELLO_COMPRESSION;
	} else if (item == HELLO_COMPRESSION) {
		in->want += 1 + b[0];
		in->item = HELLO_EXTENSIONS;
	} else if (item == HELLO_EXTENSIONS) {
		in->want += 2;
		in->item = HELLO_EXTENSION;
	} else if (item == HELLO_EXTENSION) {
		if (be16(b) == 0) {
			in->want += 4;
			in->item = HELLO_SERVER_NAME;
		} else {
			if (be16(b) == 51 && be16(b + 2) > 2 * KEY_SHARE_KEPT) {
				in->cut = in->want + 4 + KEY_SHARE_KEPT;
				in->cut_end = in->want + 4 + be16(b + 2);
			}
			in->want += 4 + be16(b + 2);
		}
	} else {
		in->name_length = be16(b + 3);
		in->want += 5;
		in->item = HELLO_NAME;
		if (b[2] != 0 || in->name_length == 0 || in->name_length > 253 || in->want + in->name_length > in->end) {
			in->status = READ_FAILED;
			return 1;
		}
	}
	if (in->want >= in->end) { /* nothing left to hold a name */
		in->status = READ_NO_NAME;
		return 1;
	}
	return 0;
}

INLINE void hello_feed(struct inspection *in, struct source *from)
{
#pragma clang loop unroll(disable)
	for (int i = 0; i < HELLO_STEPS; i++)
		if (hello_step(in, from))
			return;
	in->status = READ_FAILED;
}

#endif
