/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The parsers of bpf/lib on the host: a library for ctypes; with -DFUZZ a program that reads cases from its input,
 * for the sanitizers; with -DLIBFUZZER a target for clang -fsanitize=fuzzer. Feeds a stream in pieces by the rules
 * of inspect_hello() and inspect_head() in bpf/packets.h. What the answers ought to be is test_bpf_lib.py's part.
 */
#include <linux/types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;

#define EBFW_HOST
#include "wire.h"
#include "lib/packet.h"
#include "lib/head.h"

/* Where the digest goes, and what was lost: given by whoever includes frames.h. */
struct walk;
struct frames;
static void digest_out(struct walk *w);
static void frames_lose(void);
#include "lib/frames.h"

#define HEAD_LIMIT 8192 /* as in packets.h */
#define BASE 40         /* what lies before the payload in the packet */

/* As far as lines are looked for in one segment. */
const u32 host_head_reach = HEAD_PIECES * PIECE;

/* A segment: stream bytes [at, at + length). */
struct piece {
	u32 at;
	u32 length;
};

struct answer {
	u64 id;
	u32 prefix_bits;
	u32 name_length;
	u32 named_by; /* pieces taken when the name, or that there is none, was known; 0: never */
	u32 ended_by; /* head: pieces taken when its end was seen; 0: never */
	u8 status;    /* enum reading */
	u8 ended;
	u8 tunnel;
	u8 pad[5];
	u8 text[NAME_SIZE];
	u8 reversed[NAME_SIZE];
};

int host_parse(const u8 *data, u32 captured, u32 total, struct packet *p)
{
	u8 *exact = malloc(captured ? captured : 1);
	struct source from = {exact, captured};
	int failed;

	memcpy(exact, data, captured);
	failed = parse_packet(&from, total, p);
	free(exact);
	return failed;
}

int host_plain(const u8 *data, u32 captured, u32 total, struct packet *p)
{
	u8 *exact = malloc(captured ? captured : 1);
	int failed;

	memcpy(exact, data, captured);
	failed = parse_plain(exact, exact + captured, total, p);
	free(exact);
	return failed;
}

/* A packet that holds this piece and not a byte more, so that a sanitizer sees a read beyond it. */
static struct source packet_of(const u8 *stream, struct piece piece)
{
	u8 *data = malloc(BASE + piece.length);
	struct source from = {data, BASE + piece.length};

	memset(data, 0xee, BASE);
	memcpy(data + BASE, stream + piece.at, piece.length);
	return from;
}

static void describe(struct inspection *in, struct piece piece)
{
	in->base = BASE;
	in->at = piece.at;
	in->length = piece.length;
}

/* Who showed the name, in the low bits of its id; the numbers are the caller's affair. */
enum { BY_HELLO = 1, BY_HEAD = 2 };

static void take_name(struct answer *a, struct inspection *in, u64 evidence)
{
	a->name_length = in->name_length;
	memcpy(a->text, in->text, NAME_SIZE);
	a->id = name_finish(in, evidence);
	a->prefix_bits = in->key.prefix_bits;
	memcpy(a->reversed, in->key.reversed, NAME_SIZE);
}

void host_hello(const u8 *stream, const struct piece *pieces, u32 count, struct answer *a)
{
	struct inspection *in = calloc(1, sizeof(*in));

	memset(a, 0, sizeof(*a));
	for (u32 i = 0; i < count; i++) {
		struct source from = packet_of(stream, pieces[i]);

		describe(in, pieces[i]);
		hello_feed(in, &from);
		free((void *)from.data);
		a->status = in->status;
		if (in->status == READING)
			continue;
		a->named_by = i + 1;
		if (in->status == READ_NAME)
			take_name(a, in, BY_HELLO);
		break;
	}
	free(in);
}

void host_head(const u8 *stream, const struct piece *pieces, u32 count, struct answer *a)
{
	struct inspection *in = calloc(1, sizeof(*in));

	memset(a, 0, sizeof(*a));
	for (u32 i = 0; i < count; i++) {
		struct source from;

		describe(in, pieces[i]);
		if (in->next - in->at >= in->length) /* sent again */
			continue;
		from = packet_of(stream, pieces[i]);
		head_feed(in, &from);
		free((void *)from.data);
		in->next = in->at + in->length;
		if (in->status != READING && !a->named_by) {
			a->status = in->status;
			a->named_by = i + 1;
		}
		if (in->status == READ_NAME) {
			take_name(a, in, BY_HEAD);
			in->status = READ_NO_NAME;
		}
		a->tunnel = in->tunnel;
		if (in->ended) {
			a->ended = 1;
			a->ended_by = i + 1;
		}
		if (in->ended || in->next >= HEAD_LIMIT)
			break;
	}
	free(in);
}

/* What goes up the ring, one after the other. */
struct told {
	u32 told;
	u32 left;
	u32 piece; /* in which piece */
	u32 broken;
	u32 length;
	u8 bytes[DIGEST_MOST + DIGEST_CHUNK];
};

static struct {
	struct told *to;
	u32 room, count, piece, lost;
} out;

static void digest_out(struct walk *w)
{
	struct told *t;

	if (out.count >= out.room)
		return;
	t = &out.to[out.count++];
	t->told = w->head.offset;
	t->left = w->head.sequence;
	t->broken = w->head.flags & RECORD_BROKEN;
	t->piece = out.piece;
	t->length = w->used;
	memcpy(t->bytes, w->bytes, w->used);
}

static void frames_lose(void)
{
	out.lost++;
}

#define RUNS 33 /* as in packets.h: as often as a program may call itself */

/*
 * Segments of one direction, in the order in which they come; how many records went up. `state`: enum walking to begin
 * with. `memory`: plaintext, whose pieces come in order.
 */
u32 host_frames(const u8 *stream, const struct piece *pieces, u32 count, u32 state, int memory, struct told *to, u32 room,
		u32 *lost)
{
	struct frames *f = calloc(1, sizeof(*f));
	struct walk *w = calloc(1, sizeof(*w));

	memset(&out, 0, sizeof(out));
	out.to = to;
	out.room = room;
	f->state = state;
	f->next = 0xfffff000; /* sequence numbers wrap */
	f->left = state == WALK_PREFACE ? PREFACE_LENGTH : 0;
	for (u32 i = 0; i < count; i++) {
		struct source from = packet_of(stream, pieces[i]);
		int more = 1;

		out.piece = i;
		w->memory = (u64)(from.data + BASE);
		w->base = BASE;
		w->length = pieces[i].length;
		w->position = 0;
		for (int run = 0; run < RUNS && more; run++) {
			if (!memory && !frames_place(f, w, 0xfffff000 + pieces[i].at))
				more = 0;
			else
				more = frames_run(f, w, &from, memory);
		}
		if (more) {
			frames_lost(f);
			f->next += w->length - w->position;
		}
		free((void *)from.data);
	}
	*lost = out.lost;
	free(f);
	free(w);
	return out.count;
}

#if defined(FUZZ) || defined(LIBFUZZER)
#define MOST 512 /* pieces */

static void must(int holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "violated: %s\n", what);
	abort();
}

/* Any cutting, some pieces sent twice or from further back. */
static u32 cut(struct piece *pieces, u32 length, u32 seed)
{
	u32 at = 0, count = 0, most = 1 + (seed & 0x3ff);

	while (at < length && count < MOST) {
		u32 back, take;

		seed = seed * 1664525 + 1013904223;
		take = 1 + (seed >> 8) % most;
		back = (seed & 0xe0) ? 0 : (seed >> 20) % (at + 1);
		if (count == MOST - 1 || take > length - at)
			take = length - at;
		pieces[count++] = (struct piece){at - back, take + back};
		at += take;
	}
	return count;
}

/*
 * Does the word-at-a-time search see every line of this? Not what follows a line of less than eight bytes, unless
 * that is empty, and it sees a line end in the \v of "\n\v".
 */
static int plain_lines(const u8 *data, u32 length)
{
	u32 last = ~0U;

	for (u32 i = 0; i < length; i++) {
		if (data[i] != '\n')
			continue;
		if (i + 1 < length && data[i + 1] == '\v')
			return 0;
		if (last != ~0U && i - last < 8 && i - last != 1 && !(i - last == 2 && data[i - 1] == '\r'))
			return 0;
		last = i;
	}
	return 1;
}

static void check_name(const struct answer *a, u32 longest)
{
	if (a->status != READ_NAME)
		return;
	must(a->name_length >= 1 && a->name_length <= longest, "length of the name");
	must(a->prefix_bits == (a->name_length + 1) * 8, "bits of the key");
	must(a->id & 3, "id is never 0");
	must(a->reversed[NAME_SIZE - 1] == 0, "the key ends in zeros");
}

static int same(const struct answer *a, const struct answer *b)
{
	return a->status == b->status && a->ended == b->ended && a->name_length == b->name_length && a->id == b->id &&
	       !memcmp(a->text, b->text, a->name_length) && !memcmp(a->reversed, b->reversed, NAME_SIZE);
}

/* The digest of both, one behind the other; 0 where a place was lost. */
static u32 digest_of(const u8 *data, const struct piece *pieces, u32 count, int memory, u8 *to)
{
	static struct told records[4096];
	u32 lost, length = 0, n = host_frames(data, pieces, count, WALK_START, memory, records, 4096, &lost);

	for (u32 i = 0; i < n; i++) {
		must(records[i].length || records[i].broken, "an empty record says that something is missing");
		must(records[i].length <= sizeof(records[i].bytes), "length of a record");
		must(records[i].told == length || records[i].broken, "records follow each other");
		if (length + records[i].length > 1 << 20)
			return 0;
		memcpy(to + length, records[i].bytes, records[i].length);
		length += records[i].length;
	}
	return lost ? 0 : length;
}

/* A case: which parser, how to cut (3 bytes), then the bytes. */
int LLVMFuzzerTestOneInput(const u8 *data, size_t size)
{
	static struct piece pieces[MOST];
	struct answer whole, parts;
	struct piece one = {0, 0};
	struct packet p, plain;
	u32 length, count;

	if (size < 5)
		return 0;
	length = one.length = size - 4;
	count = cut(pieces, length, data[1] | data[2] << 8 | (u32)data[3] << 16);
	switch (data[0] % 4) {
	case 0:
		if (host_parse(data + 4, length, length, &p) == 0 && p.length)
			must(p.payload + p.length == length, "the payload ends with the packet");
		memset(&plain, 0, sizeof(plain));
		if (host_plain(data + 4, length, length, &plain) == 0)
			must(!memcmp(&p, &plain, sizeof(p)), "a plain packet is the same to both");
		break;
	case 1:
		host_hello(data + 4, &one, 1, &whole);
		host_hello(data + 4, pieces, count, &parts);
		check_name(&whole, 253);
		check_name(&parts, 253);
		/* a whole hello may fail for more items than one segment may hold */
		must(whole.status == READ_FAILED || same(&whole, &parts), "a cut hello reads as a whole one");
		break;
	case 3: {
		static u8 a[1 << 20], b[1 << 20];
		u32 in_one = digest_of(data + 4, &one, 1, 1, a), in_parts = digest_of(data + 4, pieces, count, 0, b);

		if (in_one && in_parts)
			must(in_one == in_parts && !memcmp(a, b, in_one), "a cut stream has the digest of a whole one");
		break;
	}
	default:
		host_head(data + 4, &one, 1, &whole);
		host_head(data + 4, pieces, count, &parts);
		check_name(&whole, 254);
		check_name(&parts, 254);
		if (length <= host_head_reach && plain_lines(data + 4, length))
			must(same(&whole, &parts), "a cut head reads as a whole one");
	}
	return 0;
}
#endif

#ifdef FUZZ
/* In: cases, each after its length (u32, host order). Out: how many; or a sanitizer's report. */
int main(void)
{
	u32 length, cases = 0;

	while (fread(&length, sizeof(length), 1, stdin) == 1) {
		u8 *data = malloc(length ? length : 1);

		if (!data || fread(data, 1, length, stdin) != length)
			return 2;
		LLVMFuzzerTestOneInput(data, length);
		free(data);
		cases++;
	}
	printf("%u\n", cases);
	return 0;
}
#endif
