/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * wire.h: the contract between the kernel side and exporter/kernel/wire.py.
 *
 * Every struct and constant that crosses. Fixed widths, explicit padding, no bool, pointer or bitfield; an IPv4
 * address is its IPv4-mapped IPv6 form (RFC 4291, 2.5.5.2), so that there is one code path. Multi-byte integers
 * are in host order, addresses in network order. tests/unit/test_wire.py holds this file against wire.py.
 */
#ifndef EBFW_WIRE_H
#define EBFW_WIRE_H

/* Raise it when a pinned map changes its key, value or meaning: an agent that finds another number starts anew. */
#define LAYOUT_VERSION 5

/* Maps are named by these numbers in the compiled instructions; the loader replaces each with a file descriptor. */
enum map_id {
	MAP_SETTINGS = 1,
	MAP_SOCKETS,
	MAP_INSPECTIONS,
	MAP_SCRATCH,
	MAP_FREE_SCRATCH,
	MAP_FLOWS,
	MAP_TRAFFIC,
	MAP_CONNECTIONS,
	MAP_FREE_SLOTS,
	MAP_SPARE_SLOTS,
	MAP_NAMES,
	MAP_DESTINATIONS,
	MAP_EXCLUDED_NAMES,
	MAP_TALLIES,
	MAP_SCOPE,
	MAP_RECORDS,
	MAP_RECEIVED,
	MAP_TLS_STREAMS,
	MAP_TLS_CALLS,
	MAP_EXECUTIONS,
	MAP_HTTP2,
	MAP_FRAMES_OUT,
	MAP_FRAMES_IN,
	MAP_FRAMES_TLS,
	MAP_TLS_HTTP2,
	MAP_ACCEPTING,
	MAP_INBOUND,
};

enum role { ROLE_UNKNOWN, ROLE_CLIENT, ROLE_SERVER };

enum scope { SCOPE_INTERNET, SCOPE_LOOPBACK, SCOPE_PRIVATE, SCOPE_LINK_LOCAL };

/* What one row of the flow table stands for. */
enum flow_kind {
	FLOW_PEER,     /* client: one peer address, port, transport and name */
	FLOW_INBOUND,  /* server: one local port and transport, however many clients */
	FLOW_EXCLUDED, /* what `exclude` matched: one row a scope */
	FLOW_OTHER,    /* what found no room, and idle rows that were folded */
};

struct flow_key {
	__u64 cgroup;
	__u64 name;     /* hash of the name shown, 0 until SNI or Host; see struct name */
	__u8 peer[16];
	__u16 port;     /* the peer's; the local one on FLOW_INBOUND */
	__u8 transport; /* IP protocol number */
	__u8 role;
	__u8 scope;
	__u8 kind;
	__u8 redirected; /* on FLOW_PEER: see RECORD_REDIRECTED */
	__u8 pad;
};

struct flow_row {
	__u32 slot;
	__u32 generation; /* of the slot when this row took it */
	__u64 since_ns;   /* CLOCK_MONOTONIC */
};

/* One stripe of a slot's packet counters; index = slot + (cpu % STRIPES) * slots. */
#define STRIPES 4
struct traffic {
	__u64 tx_bytes;
	__u64 tx_packets;
	__u64 rx_bytes;
	__u64 rx_packets;
	__u32 generation; /* a socket whose copy differs looks its row up again; the agent raises it to free a slot */
	__u32 taken;      /* in the first stripe: 1 from the time a row takes the slot until the agent frees it */
};

/* A slot's counters of what happens once a connection, not once a packet. */
struct connections {
	__u64 opened;
	__u64 closed;
	__u64 refused;
	__u64 timed_out;
	__u64 cancelled;
	__u64 unreachable;
	__u64 denied;
	__u64 retransmits;
};

/* Names are kept reversed, lower case, with a final dot ("moc.elpmaxe."), as a suffix match by prefix needs them. */
#define NAME_SIZE 256
#define NAME_FROM_SNI 1 /* the low two bits of a name's id */
#define NAME_FROM_HOST 2
struct name {
	__u8 reversed[NAME_SIZE];
};

struct name_key {
	__u32 prefix_bits;
	__u8 reversed[NAME_SIZE];
};

struct address_key {
	__u32 prefix_bits;
	__u8 address[16];
};

struct destination {
	__u8 scope;
	__u8 excluded;
	__u16 pad;
};

struct settings {
	__u32 slots;
	__u32 wakeup_bytes; /* wake the reader when this much of the ring is unread */
	__u32 zero;         /* zero, which the verifier cannot know: see forget() */
	__u32 pad;
};

/* Per-CPU tallies: losses first, then what `exclude` kept from being told, then the rest. */
enum tally {
	LOST_RING_FULL,     /* a record found no room in the ring */
	LOST_FLOW_TABLE,    /* no free slot: traffic went to the workload's ~other row */
	LOST_FLOW_OVERFLOW, /* not even that: the node-wide row, slot 0 */
	LOST_NAME_TABLE,    /* no room for a name: the flow stays unnamed */
	LOST_SOCKET,        /* no socket storage: traffic of this packet went uncounted */
	LOST_HELLO,         /* a ClientHello that could not be read to its end */
	LOST_SCRATCH,       /* no room to read a name in: the flow stays unnamed */
	LOST_EXECUTION,     /* no room to say that a program began: the next scan finds it */
	LOST_FRAMES,        /* HTTP/2: where a frame begins is no longer known */
	FILTERED_CONNECT,
	FILTERED_CLOSE,
	FILTERED_TLS,
	FLOWS_MADE, /* rows added to the flow table: where it stands still, there are no new ones to read */
	TALLIES,
};

enum record_kind {
	RECORD_OPENED = 1, /* TCP handshake done; UDP: first datagram to this peer */
	RECORD_FAILED,
	RECORD_CLOSED,
	RECORD_DNS_QUERY,  /* payload: the message; over TCP a piece of the stream, whose sequence number is `offset` */
	RECORD_DNS_ANSWER, /* payload: likewise */
	RECORD_HELLO,      /* payload: a piece of a ClientHello, `offset` bytes into it */
	RECORD_HEAD,       /* payload: a piece of an HTTP/1 request head, `offset` bytes into it */
	RECORD_TLS_WRITE,  /* payload: what an application handed to its TLS library, if it looks like HTTP */
	RECORD_RESPONSE,   /* payload: the first bytes of an answer to an HTTP/1 request; rx_bytes: how many came at once */
	RECORD_RECEIVED,   /* rx_bytes: so much of the response has come, the last at time_ns */
	RECORD_TLS_CLOSED, /* the application freed its TLS connection */
	RECORD_SERVER_HELLO, /* payload: the first bytes of the server's answer to a ClientHello: a ServerHello or an alert */
	RECORD_HANDSHAKE_END, /* payload: the first bytes of what the client says to that: its Finished, or an alert */
	RECORD_QUIC_INITIAL,  /* payload: a datagram that begins with a QUIC Initial packet */
	RECORD_FRAMES_OUT, /* payload: a piece of the digest of an HTTP/2 connection (lib/frames.h), sent */
	RECORD_FRAMES_IN,  /* and received */
};

enum outcome {
	OUTCOME_NONE,
	OUTCOME_OK,
	OUTCOME_REFUSED,
	OUTCOME_TIMED_OUT,
	OUTCOME_CANCELLED,
	OUTCOME_UNREACHABLE,
	OUTCOME_DENIED,
	OUTCOME_RESET,
};

#define RECORD_TRUNCATED 1 /* record.flags: the payload is shorter than what was seen */
#define RECORD_PROXIED 2   /* record.flags: behind a CONNECT to an HTTP proxy */
#define RECORD_HEAD_END 4  /* record.flags: the head, or the ClientHello, ends in this piece */
#define RECORD_BROKEN 16     /* record.flags, of a digest: bytes are missing between this piece and the one before */
#define RECORD_LAST_CHUNK 8 /* record.flags: a chunked body seems to end here */
#define RECORD_EXCLUDED 128 /* record.flags: matched `exclude`; told only because of its port, OTLP's */
#define RECORD_CUT 32      /* record.flags: of the ClientHello's key share only KEY_SHARE_KEPT bytes are there */
#define RECORD_ABANDONED 16 /* record.flags: nothing more comes of this ClientHello: unreadable, or excluded by its name */
#define RECORD_REDIRECTED 64 /* record.flags: what is meant for another host goes to this one: to a mesh's sidecar, say */

struct record {
	__u64 time_ns; /* CLOCK_MONOTONIC, when the thing happened */
	__u64 cgroup;
	__u64 cookie;  /* the socket's; 0 = no socket known */
	__u64 name;    /* hash of the name that this flow carries, 0 = none */
	__u8 local[16];
	__u8 peer[16];
	__u8 comm[16];
	__u32 pid;
	__u16 local_port;
	__u16 peer_port;
	__u8 kind;
	__u8 transport;
	__u8 role;
	__u8 scope;
	__u8 outcome;
	__u8 flags;
	__u16 length; /* of the payload that follows */
	__u64 duration_ns;
	__u64 tx_bytes;
	__u64 rx_bytes;
	__u32 retransmits;
	__u32 rtt_us;
	__u32 offset;
	__u32 sequence; /* HTTP/1: the how-manieth request of its connection, from 1; of a digest: see lib/frames.h */
};

/* What EXECUTIONS carries: a process of the watched subtree became another program. */
struct execution {
	__u64 time_ns;
	__u32 pid;
	__u32 pad;
};

/* Payload rooms: a record takes the smallest that fits. */
#define ROOM_SMALL 64
#define ROOM_MEDIUM 256
#define ROOM_LARGE 1024
#define ROOM_HUGE 2048
#define ROOM_GIANT 4096

/*
 * A socket's identity and progress: socket storage, gone with the socket. Not read by Python; its size is.
 * The kernel puts 72 bytes before it: with 184 it takes 256 bytes of memory, with one more field 512.
 */
struct socket {
	__u64 cgroup;
	__u64 cookie;
	__u64 name;
	__u64 began_ns;  /* connect called */
	__u64 opened_ns; /* handshake done */
	__u64 tx_bytes;
	__u64 rx_bytes;
	__u8 peer[16];
	__u8 local[16];
	__u8 comm[16];
	__u32 pid;
	__u32 slot;
	__u32 generation;
	__u32 stride; /* slots in the table, the distance between a slot's stripes; 0 = slot not looked up yet */
	__u16 peer_port;
	__u16 local_port;
	__u8 transport;
	__u8 role;
	__u8 scope;
	__u8 stage;
	__u32 flags;
	__u32 retransmits;
	__u64 response_bytes; /* of the response that is coming in; the last of them */
	__u64 response_ns;    /* came at this time */
	__u32 inspected; /* TCP sequence number after the last payload that was looked at; UDP: Initial packets told */
	__u32 requests;  /* HTTP/1: begun on this connection, */
	__u32 answers;   /* and of those, how many had their response begin */
	__u32 request_start; /* TCP sequence numbers: where the last request began, */
	__u32 sent_to;       /* what has left ends, */
	union {
		__u32 answer_start; /* the next response will begin, */
		__u32 hello_start;  /* TLS: the ClientHello begins, */
	};
	union {
		__u32 received_to; /* what has come ends */
		__u32 hello_end;   /* TLS: the ClientHello ends */
	};
	__u8 more;     /* written by ingress: more of a response came than was told */
	__u8 upgraded; /* HTTP is over on this connection (101) */
	__u8 bare; /* length of a packet without payload, once the first with one has left: whatever is no longer has none */
	__u8 pad;
};

/* Which listening socket's packet this CPU is at: see accepted() in tcp.h. */
struct accepting {
	__u32 slot;
	__u32 port; /* 0 = none */
};

/* What a CPU found last of a FLOW_INBOUND row. */
#define INBOUND_CACHE 64
struct inbound {
	__u64 cgroup;
	__u32 port; /* 0 = none */
	__u32 slot;
	__u32 generation;
	__u32 version; /* odd: being written */
};

/* How far an HTTP/1 response has come, by the connection's cookie: for one that does not come in one piece. */
struct received {
	__u64 bytes;
	__u64 last_ns; /* CLOCK_MONOTONIC */
};

/* A TLS connection as its library knows it. */
struct tls_key {
	__u64 connection; /* the library's pointer */
	__u32 pid;
	__u32 pad;
};

struct tls_stream {
	__u64 cookie; /* ours: the highest bit is set, which no socket's has */
	__u64 sent_bytes; /* since the last request began */
	__u64 response_bytes;
	__u64 response_ns;
	__u32 requests;
	__u32 answers;
	__u32 more; /* response_bytes came since the last record told them */
	__u32 http2;
};

/* A call that has not returned, by thread and direction, or by goroutine; and what is left to walk of HTTP/2. */
struct tls_call {
	__u64 connection;
	__u64 buffer;
	__u64 count_at; /* read: where the library says how much it read; 0: it returns that. write: how many bytes */
	__u64 time_ns;  /* write: when it was called */
	__u64 sent_at;  /* write: where the library says how much of it was sent; 0: it returns that */
	__u32 out;      /* walk: what was sent, not received */
	__u32 pad;
};

/*
 * Reading a name out of a byte stream. A borrowed entry of SCRATCH while one packet is read; socket storage between
 * packets, where the stream comes in pieces.
 * `dots` stands right before `text`, so that a name read backwards from its end is followed by a dot and zeros.
 */
#define KEY_SHARE_KEPT 128 /* of a post-quantum key share's 1,200 bytes and more: which groups it is of */
#define PIECE 56
#define CARRY 8
struct inspection {
	__u8 dots[NAME_SIZE];
	__u8 text[2 * NAME_SIZE]; /* the name, forwards; twice the size: the verifier bounds offset and length apart */
	struct name_key key;
	__u32 start;       /* TCP sequence number of the stream's first byte */
	__u32 base;        /* this segment: where its payload lies in the packet, */
	__u32 at;          /* which byte of the stream that is, */
	__u32 length;      /* and how many there are */
	__u32 next;        /* bytes of the stream taken in so far */
	__u32 want;        /* hello: where the next item begins; head: where the Host value begins */
	__u32 end;         /* hello: where the extensions end; head: where the port begins in `text` */
	__u32 name_length;
	__u32 name_have;   /* bytes of the name in `text` */
	__u32 cut;         /* hello: where what nobody reads of a long key share begins, */
	__u32 cut_end;     /* and where it ends; 0: there is none */
	__u32 fresh;       /* head: bytes of this piece */
	__u8 item;         /* hello: enum hello_item */
	__u8 carried;      /* hello: bytes of the item that earlier pieces brought */
	__u8 status;       /* enum reading */
	__u8 ended;        /* head: its last line was seen */
	__u8 tunnel;       /* head: the method is CONNECT */
	__u8 pad[3];
	__u8 carry[16];    /* hello: the item being read */
	__u8 piece[CARRY + PIECE + 80]; /* head: the last bytes of the piece before, then this piece, then zeros */
};

/* One direction of an HTTP/2 connection: in which frame its byte stream stands. */
struct frames {
	__u32 next;   /* TCP sequence number of the next byte, or bytes of plaintext so far */
	__u32 left;   /* of the frame in progress: payload bytes still to come */
	__u32 told;   /* bytes of the digest so far */
	__u32 data;   /* DATA not told yet: its length without padding, */
	__u32 stream; /* and its stream; 0 = none */
	__u32 step;   /* length of the last frame, where that was plain DATA of this stream that does not end it */
	__u8 header[32]; /* ten are used; the verifier bounds offset and length apart */
	__u8 have;    /* bytes of a frame header that earlier pieces brought */
	__u8 keep;    /* the payload in progress is told */
	__u8 state;   /* enum walking */
	__u8 broken;  /* bit 0, 1: the digest does not continue what was told; bit 1: which is to be told at once */
	__u8 misses;
	__u8 assumed; /* a frame's header was missed, and taken to be as the one before; the next one will show it */
	__u8 pad[2];
};

struct http2 {
	struct frames out;
	struct frames in;
};

/* A piece of a byte stream being walked, in an entry of SCRATCH. */
#define DIGEST_MOST 1024
#define DIGEST_CHUNK 256
struct walk {
	__u8 dots[NAME_SIZE]; /* an inspection's, which must find them as it left them: never written here */
	__u64 memory;   /* the piece in user memory: its address */
	__u32 base;     /* in a packet: the offset */
	__u32 length;   /* of the piece */
	__u32 position; /* how much of it was walked */
	__u32 used;     /* bytes in `bytes` */
	__u32 failed;
	__u32 pad;
	struct record head;
	__u8 bytes[DIGEST_MOST + DIGEST_CHUNK];
};

union scratch {
	struct inspection inspection;
	struct walk walk;
};

#endif
