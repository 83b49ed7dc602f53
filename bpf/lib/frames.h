/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * From the byte stream of an HTTP/2 connection (RFC 9113 section 4), one direction, however it is cut into pieces, to
 * its digest: what userland needs to tell requests. HEADERS, CONTINUATION, PUSH_PROMISE, RST_STREAM and GOAWAY stand
 * in it whole. Of DATA there is the header alone, with the length less its padding; DATA frames of one stream in a row
 * are one header, so that a large body costs one. Other frames are left out.
 *
 * A record says where in the digest it begins (`offset`), and how many bytes of it end a frame that began in a record
 * before (`sequence`; more than there are if it goes on), so that whoever misses one can go on with the next.
 *
 * A piece that is missing ends what is known: the digest then goes on where a later piece begins with a frame, and
 * says so. Bytes missing inside a DATA payload do no harm; nor do headers between DATA frames of one length, which
 * shows where the next one begins (frames_bridge). Not read: header blocks.
 */
#ifndef EBFW_FRAMES_H
#define EBFW_FRAMES_H

#include "source.h"

#define PREFACE_LENGTH 24
#define FRAME_HEADER 9

enum frame_type {
	FRAME_DATA,
	FRAME_HEADERS,
	FRAME_PRIORITY,
	FRAME_RST_STREAM,
	FRAME_SETTINGS,
	FRAME_PUSH_PROMISE,
	FRAME_PING,
	FRAME_GOAWAY,
	FRAME_WINDOW_UPDATE,
	FRAME_CONTINUATION,
};

#define FRAME_END_STREAM 1
#define FRAME_END_HEADERS 4
#define FRAME_PADDED 8

/* Bit n: frames of type n ... */
#define FRAMES_TOLD 0x2aa     /* stand in the digest whole */
#define FRAMES_OF_STREAM 0x22f /* belong to a stream, */
#define FRAMES_OF_NONE 0xd0    /* to none */
/* Payload lengths that the type fixes, four bits each, lowest first; 0 = any. */
#define FRAME_LENGTHS 0x0408004500ULL

#define DATA_MOST 0x7fffff /* held back; a length has 24 bits, and one frame more must fit */
#define FRAME_STEPS 64     /* of one run; a frame takes two, and one more for each 256 bytes that are told */
#define FRAMES_MISSES 64   /* pieces without a frame at their start, one after the other: this is no HTTP/2 */

enum walking {
	WALK_OFF,     /* not HTTP/2 after all */
	WALK_PREFACE, /* the first frame must be SETTINGS */
	WALK_START,   /* the first piece begins with a frame */
	WALK_MIDWAY,  /* the connection is older than we are */
	WALK_ON,
	WALK_SEEK,    /* no frame boundary is known */
};

/* frames.header, once it is whole */
INLINE u32 frame_length(const struct frames *f)
{
	return (u32)f->header[0] << 16 | (u32)f->header[1] << 8 | f->header[2];
}

INLINE u32 frame_stream(const struct frames *f)
{
	return ((u32)f->header[5] << 24 | (u32)f->header[6] << 16 | (u32)f->header[7] << 8 | f->header[8]) & 0x7fffffff;
}

/*
 * Can this be the header of a frame? All ones where it can. Without branches, as all that is done with every frame:
 * verifiers before 6.12 walk every combination of them.
 */
INLINE u64 if_valid(const struct frames *f)
{
	u64 type = f->header[3], length = frame_length(f), known = if_at_most(type, FRAME_CONTINUATION), bit = type & 15;
	u64 of_none = if_zero(frame_stream(f)), fixed = FRAME_LENGTHS >> (bit * 4) & 15, wrong;

	wrong = -(FRAMES_OF_STREAM >> bit & 1) & of_none;
	wrong |= -(FRAMES_OF_NONE >> bit & 1) & ~of_none;
	wrong |= ~if_zero(fixed) & ~if_zero(fixed ^ length);
	wrong &= known;
	wrong |= ~known & ~if_at_most(length, 16384); /* an extension (section 5.5) */
	wrong |= if_zero(f->state ^ WALK_PREFACE) & ~if_zero(type ^ FRAME_SETTINGS);
	return ~wrong;
}

/*
 * Is it so much like one that a piece may be taken to begin with it where nothing is known? Not after a loss alone: also
 * on connections that are older than the agent, and those may speak anything.
 */
INLINE u64 if_evident(const struct frames *f)
{
	u64 type = f->header[3], flags = f->header[4], length = frame_length(f), headers, ping, window;

	headers = if_zero(type ^ FRAME_HEADERS) & if_zero((flags & ~0x29ULL) ^ FRAME_END_HEADERS) &
		  if_zero((f->header[8] & 1) ^ 1) & ~if_zero(length) & if_at_most(length, 16384);
	ping = if_zero(type ^ FRAME_PING) & if_at_most(flags, 1);
	window = if_zero(type ^ FRAME_WINDOW_UPDATE) & if_zero(flags);
	return (headers | ping | window) & if_valid(f) & if_zero(f->header[5] & 0x80); /* reserved, never set */
}

/* What was known is lost. The digest goes on, without a connection to what it held. */
INLINE void frames_lost(struct frames *f)
{
	u8 known = f->state == WALK_ON;

	if (known)
		frames_lose();
	f->state = f->state == WALK_PREFACE ? WALK_OFF : WALK_SEEK;
	f->broken = known ? 2 : f->broken | 1;
	f->assumed = 0;
	f->step = 0;
	f->left = 0;
	f->have = 0;
	f->data = 0;
	f->stream = 0;
}

/* Nine bytes at the digest's end; they stay there only where `mask` is all ones. */
INLINE void tell_header(struct frames *f, struct walk *w, u64 mask, u32 length, u8 type, u8 flags, u32 stream)
{
	u64 used = w->used;
	u8 *to;

	BOUND(used, DIGEST_MOST - 1);
	to = w->bytes + used;
	to[0] = length >> 16;
	to[1] = length >> 8;
	to[2] = length;
	to[3] = type;
	to[4] = flags;
	to[5] = stream >> 24;
	to[6] = stream >> 16;
	to[7] = stream >> 8;
	to[8] = stream;
	w->used = used + (FRAME_HEADER & mask);
	f->told += FRAME_HEADER & mask;
}

/* A whole header, with the length of the padding behind it if it is one of DATA and padded. */
INLINE void take_frame(struct frames *f, struct walk *w, u64 data, u64 padded)
{
	u64 type = f->header[3], length = frame_length(f), stream = frame_stream(f), padding, net, keep, end, held;

	keep = -(FRAMES_TOLD >> (type & 15) & 1) & if_at_most(type, FRAME_CONTINUATION);
	end = data & -(u64)(f->header[4] & FRAME_END_STREAM);
	padding = (f->header[9] + 1ULL) & padded;
	net = (length - padding) & if_at_most(padding, length);
	/* DATA that was held back goes first, if this cannot be added to it */
	held = keep | (data & (~if_zero(f->stream ^ stream) | ~if_at_most(f->data + net, DATA_MOST)));
	held &= ~if_zero(f->stream);
	tell_header(f, w, held, f->data, FRAME_DATA, 0, f->stream);
	f->data = (f->data & ~held) + (net & data);
	f->stream = (f->stream & ~held & ~data) | (stream & data);
	tell_header(f, w, keep | end, (f->data & data) | (length & ~data), type, f->header[4] & (~data | FRAME_END_STREAM),
		    stream);
	f->data &= ~end;
	f->stream &= ~end;
	f->left = length - (padded & 1);
	f->step = length & data & ~padded & ~end;
	f->assumed = 0;
	f->keep = keep & 1;
	f->state = WALK_ON;
	f->have = 0;
	f->misses = 0;
}

/*
 * Payload, or as much of a header as this piece has: 0 to go on, 1 at the piece's end. All state is in map memory and
 * read anew, so that the verifier finds each turn in the state of the turn before; see hello_step().
 */
INLINE int frames_step(struct frames *f, struct walk *w, struct source *from, int user)
{
	u32 left;
	u64 take, offset, need, data, padded;

	RELOAD();
	if (w->position >= w->length || f->state == WALK_OFF)
		return 1;
	if (w->used > DIGEST_MOST - 3 * FRAME_HEADER) /* another run */
		return 1;
	left = w->length - w->position;
	if (f->left) {
		take = f->left < left ? f->left : left;
		if (f->keep) {
			if (take > DIGEST_CHUNK)
				take = DIGEST_CHUNK;
			offset = w->used;
			BOUND(offset, DIGEST_MOST - 1);
			take -= 1;
			BOUND(take, DIGEST_CHUNK - 1);
			take += 1;
			if (user ? read_user(w->memory + w->position, w->bytes + offset, take)
				 : read_bytes(from, w->base + w->position, w->bytes + offset, take)) {
				w->failed = 1;
				return 1;
			}
			w->used = offset + take;
			f->told += take;
		}
		f->left -= take;
		w->position += take;
		return 0;
	}
	offset = f->have;
	need = FRAME_HEADER;
	if (offset >= FRAME_HEADER) /* the length of the padding is part of a DATA header here */
		need += 1;
	take = need - offset;
	if (take > left)
		take = left;
	BOUND(offset, 15);
	take -= 1;
	BOUND(take, 15);
	take += 1;
	if (user ? read_user(w->memory + w->position, f->header + offset, take)
		 : read_bytes(from, w->base + w->position, f->header + offset, take)) {
		w->failed = 1;
		return 1;
	}
	w->position += take;
	f->have = offset + take;
	if (f->have < need)
		return 0;
	data = if_zero(f->header[3] ^ FRAME_DATA);
	padded = data & ~if_zero(f->header[4] & FRAME_PADDED) & ~if_zero(frame_length(f));
	if (need == FRAME_HEADER) {
		u64 evident = if_evident(f), same = data & if_zero(frame_stream(f) ^ f->stream);

		if (!(if_valid(f) & (~if_zero(f->state ^ WALK_SEEK) | evident) & (if_zero(f->assumed) | evident | same))) {
			w->failed = 1;
			return 1;
		}
		if (padded)
			return 0;
	}
	RELOAD();
	take_frame(f, w, data, padded);
	return 0;
}

/* A segment that is wholly payload which is not told: most of a large body is. */
INLINE int frames_skip(struct frames *f, u32 seq, u32 length)
{
	if (f->next != seq || f->keep || f->left < length)
		return 0;
	f->left -= length;
	f->next = seq + length;
	return 1;
}

/*
 * A gap in which at least one frame begins. Large bodies are sent in frames of one length: if those that are missing
 * are taken to be so too, it is known where the next one begins, and if a DATA frame of the same stream (or what is
 * as evident) begins just there, so they were. 0: no such thing can be taken.
 */
INLINE int frames_bridge(struct frames *f, u32 gap)
{
	u32 whole = FRAME_HEADER + f->step, beyond, count;

	if (f->keep || !f->step || !f->stream || f->have > FRAME_HEADER)
		return 0;
	beyond = gap + f->have - f->left; /* from where the first missing frame begins */
	if (beyond > DATA_MOST)
		return 0;
	count = (beyond + whole - 1) / whole;
	if (f->data + (u64)count * f->step > 2 * DATA_MOST)
		return 0;
	f->data += count * f->step;
	f->left = count * whole - beyond;
	f->have = 0;
	f->assumed = 1;
	return 1;
}

/*
 * Where a TCP segment stands: its first byte that was not seen yet, in w->position. 0 when there is none. Egress sees
 * what is sent again, ingress also what came out of order.
 */
INLINE int frames_place(struct frames *f, struct walk *w, u32 seq)
{
	u32 gap;

	if (f->state == WALK_START || f->state == WALK_MIDWAY || (f->state == WALK_SEEK && (s32)(seq - f->next) > 0))
		f->next = seq;
	gap = seq - f->next;
	if ((s32)gap <= 0) {
		w->position = -gap;
		return w->position < w->length;
	}
	if (!f->keep && f->left >= gap) {
		f->left -= gap;
	} else if (!frames_bridge(f, gap)) {
		frames_lost(f);
	}
	w->position = 0;
	f->next = seq;
	return 1;
}

/*
 * One run over a piece. 1 when there is more of it: then call again, with the piece as before. `f->next` has moved to
 * where this run came.
 */
INLINE int frames_run(struct frames *f, struct walk *w, struct source *from, int user)
{
	u32 began = w->position;

	if (f->state == WALK_START)
		f->state = WALK_ON;
	if (f->state == WALK_MIDWAY)
		frames_lost(f);
	if (f->state == WALK_SEEK) /* a piece must begin with a frame */
		f->have = 0;
	w->failed = 0;
	w->used = 0;
	w->head.offset = f->told;
	w->head.sequence = f->keep ? f->left : 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < FRAME_STEPS; i++)
		if (frames_step(f, w, from, user))
			break;
	RELOAD();
	if (w->used) {
		w->head.flags = (w->head.flags & ~RECORD_BROKEN) | (f->broken ? RECORD_BROKEN : 0);
		f->broken = 0;
		digest_out(w);
	}
	if (w->failed) {
		frames_lost(f);
		f->misses += 1;
		if (f->misses >= FRAMES_MISSES)
			f->state = WALK_OFF;
	}
	if (f->state == WALK_SEEK || f->state == WALK_OFF) /* of the rest of this piece nothing is known */
		w->position = w->length;
	if (f->broken & 2 && f->told) { /* at once: what waits for the rest must know that it may not come */
		w->used = 0;
		w->head.offset = f->told;
		w->head.sequence = 0;
		w->head.flags |= RECORD_BROKEN;
		f->broken = 0;
		digest_out(w);
	}
	f->next += w->position - began;
	return w->position < w->length;
}

#endif
