/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * From a name as it was shown to its key and its id.
 *
 * The key is the name reversed, in lower case, with a final dot: "www.Example.com" -> "moc.elpmaxe.www.". A suffix
 * match on whole labels is then a prefix match on the key. The id is a 64-bit hash of the key; two of a million
 * names share one with a chance of 3e-8.
 */
#ifndef EBFW_NAME_H
#define EBFW_NAME_H

#include "source.h"

#define BYTES(x) (0x0101010101010101ULL * (x))

/* Eight characters at once: 0x20 is set in each byte that holds 'A'..'Z'; bytes of 0x80 and more stay. */
INLINE u64 lower_word(u64 w)
{
	u64 low = w & BYTES(0x7f);
	u64 above_z = low + BYTES(0x7f - 'Z');
	u64 from_a = low + BYTES(0x80 - 'A');

	return w | (((from_a ^ above_z) & ~w & BYTES(0x80)) >> 2);
}

/* in: text[0..name_length); out: key. Returns the id: the hash, and in its low bits who showed the name; never 0. */
INLINE u64 name_finish(struct inspection *in, u64 evidence)
{
	u64 length = in->name_length, hash = 0xcbf29ce484222325ULL;
	u8 *end;

	BOUND(length, 255);
	end = in->text + length;
	in->dots[NAME_SIZE - 1] = '.';
#pragma clang loop unroll(disable)
	for (int i = 0; i < NAME_SIZE / 8; i++) {
		/* from text[0] - 256 at the lowest, which is where `dots` begins, to text[255] */
		u64 word = *(u64 *)(end - 8 * i - 8);

		word = lower_word(__builtin_bswap64(word));
		if (!word)
			break;
		*(u64 *)(in->key.reversed + 8 * i) = word;
		hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
		hash ^= hash >> 29;
	}
	in->key.prefix_bits = (length + 1) * 8;
	return (hash & ~3ULL) | evidence;
}

#endif
