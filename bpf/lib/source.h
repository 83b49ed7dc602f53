/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Where the parsers read from: a packet in the kernel; plain memory when the tests compile them for the host.
 * The parsers themselves know neither.
 */
#ifndef EBFW_SOURCE_H
#define EBFW_SOURCE_H

#define INLINE static inline __attribute__((always_inline))
#define LIKELY(x) __builtin_expect(!!(x), 1) /* clang keeps together what is: code is fetched by the cache line */
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

/*
 * Read memory anew after this. Without it clang keeps in a register what it has just stored, with the bounds that
 * the verifier knows of it; read from a map, it is a number of which nothing is known, and paths merge.
 */
#define RELOAD() asm volatile("" ::: "memory")

/*
 * BOUND: keep the low bits of x, visibly to the verifier. clang drops a mask that it can prove to be without effect; the
 * verifier, which knows less, then refuses the access. In asm the mask stays.
 */
#ifdef EBFW_HOST
#define BOUND(x, mask) ((x) &= (mask))
#define OPAQUE(x) ((void)(x))
#else
#define BOUND(x, mask) asm volatile("%0 &= %1" : "+r"(x) : "i"(mask))
#define OPAQUE(x) asm volatile("" : "+r"(x))
#endif

/* All ones where x is zero. clang would make a branch of it, and the verifier two paths of that, hence OPAQUE. */
INLINE u64 if_zero(u64 x)
{
	u64 negative;

	OPAQUE(x);
	negative = -x;
	OPAQUE(negative);
	return ((negative | x) >> 63) - 1;
}

/* All ones where a <= b; both are small. */
INLINE u64 if_at_most(u64 a, u64 b)
{
	u64 sign = b - a;

	OPAQUE(sign);
	return (sign >> 63) - 1;
}

/*
 * Zero, read from a map. Added to a number it makes the verifier forget what it knows of it: parsing leaves by dozens
 * of paths, each with other bounds, and everything after would be verified once for each.
 */
#ifdef EBFW_HOST
INLINE u32 forget(void)
{
	return 0;
}
#else
INLINE u32 forget(void)
{
	u32 key = 0;
	struct settings *settings = bpf_map_lookup_elem(MAP(SETTINGS), &key);

	return settings ? settings->zero : 0;
}
#endif

#ifdef EBFW_HOST
struct source {
	const u8 *data;
	u32 length;
};

/* n bytes at offset; 0, or negative where they are not all there. */
INLINE int read_bytes(struct source *from, u32 offset, void *to, u32 n)
{
	if (offset > from->length || n > from->length - offset)
		return -1;
	__builtin_memcpy(to, from->data + offset, n);
	return 0;
}
#define read_user(address, to, n) (__builtin_memcpy(to, (const void *)(address), n), 0)
#else
#define source __sk_buff
#define read_bytes(from, offset, to, n) bpf_skb_load_bytes(from, offset, to, n)
#define read_user(address, to, n) bpf_probe_read_user(to, n, (void *)(address))
#endif

#endif
