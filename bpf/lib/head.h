/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The Host of an HTTP/1 request head (RFC 9112 sections 3.2 and 5), however it is cut into segments. Looks for line
 * ends eight bytes at a time and at what follows each. Userspace parses the head itself; here only the name is
 * wanted, and to know where the head ends.
 */
#ifndef EBFW_HEAD_H
#define EBFW_HEAD_H

#include "hello.h"

#define FOUR(a, b, c, d) ((u32)(a) | (u32)(b) << 8 | (u32)(c) << 16 | (u32)(d) << 24)

/* The first four bytes of every method of RFC 9110 and RFC 5789; "PRI " (HTTP/2) is none. */
INLINE int is_method(u32 w)
{
	return w == FOUR('G', 'E', 'T', ' ') || w == FOUR('P', 'O', 'S', 'T') || w == FOUR('P', 'U', 'T', ' ') ||
	       w == FOUR('H', 'E', 'A', 'D') || w == FOUR('D', 'E', 'L', 'E') || w == FOUR('O', 'P', 'T', 'I') ||
	       w == FOUR('P', 'A', 'T', 'C') || w == FOUR('C', 'O', 'N', 'N') || w == FOUR('T', 'R', 'A', 'C');
}

#define STATUS_AT 8    /* in "HTTP/1.1 200 OK": the blank and the three digits */
#define STATUS_LINE 13 /* up to the blank behind them, which a status line always has (RFC 9112 section 4) */

/* 1xx: another response follows, and is the final one. */
INLINE int is_interim(u32 status)
{
	return (status & 0xffff) == (' ' | '1' << 8);
}

INLINE int is_upgrade(u32 status)
{
	return status == FOUR(' ', '1', '0', '1');
}

#define LAST_CHUNK 5 /* "0\r\n\r\n", RFC 9112 section 7.1 */
INLINE int is_last_chunk(u64 tail)
{
	return tail == (FOUR('0', '\r', '\n', '\r') | (u64)'\n' << 32);
}

/* In each byte that is below n (n <= 0x80), the high bit; bytes above the lowest such byte may be wrong. */
INLINE u64 bytes_below(u64 w, u64 n)
{
	return (w - BYTES(n)) & ~w & BYTES(0x80);
}

/* Index of the lowest byte whose high bit is set. There is no count-trailing-zeros in BPF. */
INLINE u64 lowest_byte(u64 marks)
{
	return (((((marks & -marks) >> 7) - 1) & BYTES(1)) * BYTES(1)) >> 56;
}

/* All ones where an empty line follows piece[here], which ends a line: the head's end. */
INLINE u64 if_empty_line(struct inspection *in, u64 marks, u64 here, u64 next)
{
	u64 left = CARRY + in->fresh - 1 - here; /* bytes of this piece that follow */

	return ~if_zero(marks) & ((if_zero((next & 0xffff) ^ ('\r' | '\n' << 8)) & if_at_most(2, left)) |
				  (if_zero((next & 0xff) ^ '\n') & if_at_most(1, left)));
}

/* A line ends at piece[here], if `mark` is not zero: does the Host follow, or the end of the head? */
INLINE void head_line(struct inspection *in, u64 mark, u64 here)
{
	u64 next, host, value;

	BOUND(here, 127);
	next = *(u64 *)(in->piece + here + 1);
	/* "host:" in any case: 0x20 changes neither a lower-case letter nor the colon */
	host = ~if_zero(mark) & if_zero(((next | BYTES(0x20)) & 0xffffffffffULL) ^ 0x3a74736f68ULL);
	host &= if_at_most(here + 7, CARRY + in->fresh) & if_zero(in->want | in->ended);
	/* a blank before the value is skipped: its mask is -1 */
	value = in->next - CARRY + here + 6 - (if_zero((next >> 40 & 0xff) ^ ' ') | if_zero((next >> 40 & 0xff) ^ '\t'));
	in->want |= value & host;
	in->ended |= if_empty_line(in, mark, here, next) & 1;
}

/* Lines end where the word at piece[i] is marked. Two may: an empty line, or one as short as "A: b". */
INLINE void head_word(struct inspection *in, u64 marks, u64 i)
{
	head_line(in, marks, i + lowest_byte(marks));
	marks &= marks - 1;
	head_line(in, marks, i + lowest_byte(marks));
}

/*
 * The `fresh` bytes of this piece stand in piece[CARRY..], the first of them at stream offset in->next. No branches:
 * verifiers before 6.12 do not see that both sides of one lead to the same state, and walk every combination.
 * Lengths are read from memory anew, or they would leave the loop with other bounds at every turn.
 */
INLINE void head_scan(struct inspection *in)
{
#pragma clang loop unroll(disable)
	for (u64 i = 0; i < CARRY + PIECE; i += 8) {
		u64 marks;

		RELOAD();
		marks = bytes_below(*(u64 *)(in->piece + i) ^ BYTES('\n'), 1);
		head_word(in, marks, i);
	}
}

#define HEAD_PIECES 27 /* of one segment: 1,512 bytes, more than an Ethernet segment holds; browsers send Host first (RFC 9110 section 7.2 asks for it) */

/* Look for the Host line and the end in the next piece of the segment; 1 when there is no more of it to look at. */
INLINE int head_step(struct inspection *in, struct source *from)
{
	u32 position;
	u64 n;

	RELOAD();
	position = in->next - in->at;
	if (position >= in->length || in->ended)
		return 1;
	n = in->length - position;
	if (n > PIECE)
		n = PIECE;
	n -= 1;
	BOUND(n, 63);
	n += 1;
	if (read_bytes(from, in->base + position, in->piece + CARRY, n)) {
		in->status = READ_FAILED;
		return 1;
	}
	if (!in->next)
		in->tunnel = in->piece[CARRY] == 'C'; /* no other method begins so */
	in->fresh = n;
	RELOAD();
	head_scan(in);
	n = in->fresh;
	BOUND(n, 63);
	*(u64 *)in->piece = *(u64 *)(in->piece + n); /* the last CARRY bytes go before the next piece */
	in->next += n;
	return 0;
}

/* Take the Host value out of the segment; it ends at white space or the line's end, a port is cut off. */
INLINE void head_name(struct inspection *in, struct source *from)
{
	u32 have = in->name_have, position = in->want + have - in->at;
	u64 take, offset = have;

	if (position >= in->length || have > 254)
		return;
	take = in->length - position;
	if (take > 255 - have)
		take = 255 - have;
	BOUND(offset, 255);
	take -= 1;
	BOUND(take, 255);
	take += 1;
	if (read_bytes(from, in->base + position, in->text + offset, take)) {
		in->status = READ_FAILED;
		return;
	}
	in->name_have = have + take;
	in->end = 0;
	if (in->text[0] == '[') { /* an IPv6 literal is no name */
		in->status = READ_NO_NAME;
		return;
	}
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < NAME_SIZE; i += 8) {
		u64 word = *(u64 *)(in->text + i);
		u64 blank = bytes_below(word, ' ' + 1), before = blank ? (blank & -blank) - 1 : ~0ULL;
		u64 colon = bytes_below(word ^ BYTES(':'), 1) & before, end, last;

		RELOAD();
		if (bytes_below(word ^ BYTES('@'), 1) & before) { /* somebody's user name, not a host's */
			in->status = READ_NO_NAME;
			return;
		}
		if (colon && !in->end)
			in->end = i + lowest_byte(colon) + 1; /* the port begins here */
		if (!blank)
			continue;
		end = i + lowest_byte(blank);
		if (end >= in->name_have)
			break; /* goes on in the next segment */
		RELOAD();
		if (in->end)
			end = in->end - 1;
		BOUND(end, 255);
		last = end - 1;
		BOUND(last, 255);
		if (end && in->text[last] == '.')
			end -= 1;
		in->name_length = end;
		in->status = end ? READ_NAME : READ_NO_NAME;
		break;
	}
}

INLINE void head_feed(struct inspection *in, struct source *from)
{
#pragma clang loop unroll(disable)
	for (int i = 0; i < HEAD_PIECES; i++)
		if (head_step(in, from))
			break;
	RELOAD();
	if (in->want && in->status == READING)
		head_name(in, from);
	if (in->ended && in->status == READING)
		in->status = READ_NO_NAME;
}

#endif
