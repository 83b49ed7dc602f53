// An HTTP client and server of Go's own: crypto/tls and net/http's HTTP/2, which share no code with OpenSSL and
// nghttp2. The tests build it twice, with and without symbols.
//
// As a client it prints one JSON line for each request; as a server (-serve) "listening ADDRESS" first, then one for
// each request, and it ends with its standard input. Only the standard library is used.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	var c clientOptions
	flag.StringVar(&c.url, "url", "", "client: what to request")
	flag.IntVar(&c.requests, "n", 1, "client: how many requests")
	flag.IntVar(&c.parallel, "parallel", 1, "client: how many of them at a time (streams of one connection in HTTP/2)")
	flag.BoolVar(&c.http2, "h2", false, "client: HTTP/2, negotiated over TLS, by prior knowledge without TLS")
	flag.BoolVar(&c.insecure, "insecure", false, "client: take any certificate")
	flag.StringVar(&c.ca, "ca", "", "client: PEM file of the authority to trust")
	flag.IntVar(&c.post, "post", -1, "client: POST a body of so many bytes instead of GET")
	flag.BoolVar(&c.grpc, "grpc", false, "client: POST a gRPC message of -post bytes, tell grpc-status; implies -h2")
	flag.BoolVar(&c.fresh, "fresh", false, "client: a new connection for each request")
	flag.Var(&c.headers, "header", "client: 'Name: value', may be repeated")
	flag.BoolVar(&c.wait, "wait", false, "client: send request i after reading a line i from standard input")
	flag.BoolVar(&c.turns, "turns", false, "client: for each line of standard input send so many requests, tell the seconds")

	var s serverOptions
	flag.StringVar(&s.address, "serve", "", "server: address to listen on, such as 127.0.0.1:0")
	flag.BoolVar(&s.tls, "tls", false, "server: TLS (HTTP/1.1 and HTTP/2); without it HTTP/1.1 and h2c")
	flag.StringVar(&s.cert, "cert", "", "server: PEM certificate; one of its own for localhost without it")
	flag.StringVar(&s.key, "key", "", "server: PEM key")
	flag.Parse()

	// A parent that has gone must not leave a server behind.
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	go func() { <-stop; os.Exit(0) }()

	var err error
	switch {
	case s.address != "":
		go func() { _, _ = io.Copy(io.Discard, bufio.NewReader(os.Stdin)); os.Exit(0) }()
		err = serve(s)
	case c.url != "" && c.turns:
		err = takeTurns(c)
	case c.url != "":
		err = request(c)
	default:
		flag.Usage()
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "goclient:", err)
		os.Exit(1)
	}
}
