package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

type clientOptions struct {
	url                                string
	requests, parallel, post           int
	http2, insecure, grpc, fresh, wait bool
	turns                              bool
	ca                                 string
	headers                            headerList
}

type headerList []string

func (h *headerList) String() string { return strings.Join(*h, ", ") }

func (h *headerList) Set(line string) error {
	if !strings.Contains(line, ":") {
		return errors.New("not 'Name: value'")
	}
	*h = append(*h, line)
	return nil
}

// One line of the client's output. Status 0: there was no answer, Error says why.
type outcome struct {
	Status   int               `json:"status"`
	Protocol string            `json:"protocol"`
	Bytes    int64             `json:"bytes"`
	Trailers map[string]string `json:"trailers,omitempty"`
	Error    string            `json:"error,omitempty"`
}

// request sends what is asked for; it fails if any request had no answer.
func request(options clientOptions) error {
	client, err := newClient(options)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	var (
		group  sync.WaitGroup
		mutex  sync.Mutex
		failed bool
	)
	out := json.NewEncoder(os.Stdout)
	slots := make(chan struct{}, max(1, options.parallel))
	for range options.requests {
		if options.wait && !lines.Scan() {
			break
		}
		slots <- struct{}{}
		group.Add(1)
		go func() {
			defer group.Done()
			result := one(client, options)
			mutex.Lock()
			defer mutex.Unlock()
			failed = failed || result.Error != ""
			_ = out.Encode(result)
			<-slots
		}()
	}
	group.Wait()
	if failed {
		return errors.New("a request had no answer")
	}
	return nil
}

// takeTurns reads numbers from standard input, line by line. For each it sends so many requests, one after another, and
// says on standard error how many seconds they took.
func takeTurns(options clientOptions) error {
	client, err := newClient(options)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		number, err := strconv.Atoi(lines.Text())
		if err != nil {
			return err
		}
		began := time.Now()
		for range number {
			result := one(client, options)
			if result.Error != "" {
				return errors.New(result.Error)
			}
			_ = out.Encode(result)
		}
		fmt.Fprintln(os.Stderr, time.Since(began).Seconds())
	}
	return lines.Err()
}

func newClient(options clientOptions) (*http.Client, error) {
	config := &tls.Config{InsecureSkipVerify: options.insecure}
	if options.ca != "" {
		pem, err := os.ReadFile(options.ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New(options.ca + " holds no certificate")
		}
	}
	protocols := new(http.Protocols)
	if options.http2 || options.grpc {
		protocols.SetHTTP2(true)
		protocols.SetUnencryptedHTTP2(true)
	} else {
		protocols.SetHTTP1(true)
	}
	return &http.Client{Transport: &http.Transport{
		Proxy:              nil,
		TLSClientConfig:    config,
		Protocols:          protocols,
		DisableKeepAlives:  options.fresh,
		DisableCompression: true,
		// With the default of 2, more parallel requests than that would each open a connection again.
		MaxIdleConnsPerHost: max(1, options.parallel),
	}}, nil
}

func one(client *http.Client, options clientOptions) outcome {
	method, body := http.MethodGet, io.Reader(nil)
	if options.post >= 0 || options.grpc {
		payload := bytes.Repeat([]byte{'x'}, max(0, options.post))
		if options.grpc {
			// Length-Prefixed-Message: not compressed, four bytes of length.
			payload = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(payload))), payload...)
		}
		method, body = http.MethodPost, bytes.NewReader(payload)
	}
	message, err := http.NewRequest(method, options.url, body)
	if err != nil {
		return outcome{Error: err.Error()}
	}
	if options.grpc {
		message.Header.Set("Content-Type", "application/grpc")
		message.Header.Set("TE", "trailers")
	}
	for _, line := range options.headers {
		name, value, _ := strings.Cut(line, ":")
		if name, value = strings.TrimSpace(name), strings.TrimSpace(value); strings.EqualFold(name, "Host") {
			message.Host = value
		} else {
			message.Header.Add(name, value)
		}
	}
	answer, err := client.Do(message)
	if err != nil {
		return outcome{Error: err.Error()}
	}
	defer answer.Body.Close()
	size, err := io.Copy(io.Discard, answer.Body)
	result := outcome{Status: answer.StatusCode, Protocol: answer.Proto, Bytes: size}
	if err != nil {
		result.Error = err.Error()
	}
	// gRPC sends an answer without messages as headers only: then the status is there ("Trailers-Only"). A trailer that
	// was announced and never came has no value.
	for _, fields := range []http.Header{answer.Header, answer.Trailer} {
		for name, values := range fields {
			name = strings.ToLower(name)
			if len(values) > 0 && (strings.HasPrefix(name, "grpc-") || strings.HasPrefix(name, "x-lab-")) {
				if result.Trailers == nil {
					result.Trailers = map[string]string{}
				}
				result.Trailers[name] = values[0]
			}
		}
	}
	return result
}
