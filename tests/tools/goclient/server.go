package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

type serverOptions struct {
	address, cert, key string
	tls                bool
}

// One line of the server's output.
type served struct {
	Method   string              `json:"method"`
	Target   string              `json:"target"`
	Host     string              `json:"host"`
	Protocol string              `json:"protocol"`
	Status   int                 `json:"status"`
	Bytes    int                 `json:"rx"`
	Peer     string              `json:"peer"`
	Headers  map[string][]string `json:"headers"`
}

// serve answers
//
//	/status/N       with that status
//	/bytes/N        with so many bytes
//	/delay/MS       after so many milliseconds
//	/trailers       with a body and the trailer x-lab-trailer
//	/reset          with a broken stream (HTTP/2) or connection, after the head
//	gRPC            (content type application/grpc) with the message that it got and grpc-status 0; /fail/N: without
//	                a message, with grpc-status N; /late/N: the message, then grpc-status N
//
// and anything else with what it got, or a short text.
func serve(options serverOptions) error {
	listener, err := net.Listen("tcp", options.address)
	if err != nil {
		return err
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler:           &handler{out: json.NewEncoder(os.Stdout)},
		Protocols:         protocols,
		ReadHeaderTimeout: time.Minute,
	}
	fmt.Println("listening", listener.Addr())
	if !options.tls {
		return server.Serve(listener)
	}
	if options.cert == "" {
		certificate, err := selfSigned()
		if err != nil {
			return err
		}
		server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
	}
	return server.ServeTLS(listener, options.cert, options.key)
}

type handler struct {
	mutex sync.Mutex
	out   *json.Encoder
}

func (h *handler) ServeHTTP(answer http.ResponseWriter, message *http.Request) {
	body, _ := io.ReadAll(message.Body)
	row := served{
		message.Method, message.RequestURI, message.Host, message.Proto, http.StatusOK, len(body), message.RemoteAddr,
		message.Header,
	}
	if strings.HasPrefix(message.Header.Get("Content-Type"), "application/grpc") {
		h.log(row)
		grpc(answer, message.URL.Path, body)
		return
	}
	words := append(strings.Split(strings.Trim(message.URL.Path, "/"), "/"), "")
	number, _ := strconv.Atoi(words[1])
	if words[0] == "status" && number >= 200 && number < 600 {
		row.Status = number
	}
	h.log(row)
	switch words[0] {
	case "status":
		answer.WriteHeader(row.Status)
	case "bytes":
		answer.Header().Set("Content-Length", strconv.Itoa(number))
		_, _ = answer.Write(make([]byte, number))
	case "delay":
		time.Sleep(time.Duration(number) * time.Millisecond)
		_, _ = io.WriteString(answer, "late\n")
	case "trailers":
		answer.Header().Set("Trailer", "x-lab-trailer")
		_, _ = io.WriteString(answer, "before the trailer\n")
		answer.Header().Set("x-lab-trailer", "here")
	case "reset":
		_, _ = io.WriteString(answer, "not all")
		_ = http.NewResponseController(answer).Flush()
		panic(http.ErrAbortHandler)
	default:
		if len(body) == 0 {
			body = []byte("this is the lab\n")
		}
		_, _ = answer.Write(body)
	}
}

func (h *handler) log(row served) {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	_ = h.out.Encode(row)
}

func grpc(answer http.ResponseWriter, path string, message []byte) {
	status := "0"
	words := append(strings.Split(strings.Trim(path, "/"), "/"), "")
	if words[0] == "fail" || words[0] == "late" {
		status = words[1]
	}
	answer.Header().Set("Content-Type", "application/grpc")
	if words[0] == "fail" {
		answer.Header().Set("grpc-status", status)
		answer.Header().Set("grpc-message", "as asked")
		return
	}
	answer.Header().Set("Trailer", "grpc-status, grpc-message")
	_, _ = answer.Write(message)
	answer.Header().Set("grpc-status", status)
	if status != "0" {
		answer.Header().Set("grpc-message", "as asked")
	}
}

func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "localhost"},
		DNSNames:     []string{"localhost"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
