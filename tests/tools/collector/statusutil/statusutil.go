// Package statusutil stands in for the module of this name, of which the module proxy has nothing: the two functions
// that the OTLP receiver and exporter call, written from the OTLP specification (failures over HTTP, throttling).
package statusutil

import (
	"net/http"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var grpcCodes = map[int]codes.Code{
	http.StatusBadRequest:         codes.InvalidArgument,
	http.StatusUnauthorized:       codes.Unauthenticated,
	http.StatusForbidden:          codes.PermissionDenied,
	http.StatusNotFound:           codes.Unimplemented,
	http.StatusTooManyRequests:    codes.ResourceExhausted,
	http.StatusBadGateway:         codes.Unavailable,
	http.StatusServiceUnavailable: codes.Unavailable,
	http.StatusGatewayTimeout:     codes.Unavailable,
}

// NewStatusFromMsgAndHTTPCode is the gRPC status that means what an HTTP status means.
func NewStatusFromMsgAndHTTPCode(message string, httpStatus int) *status.Status {
	code, known := grpcCodes[httpStatus]
	if !known {
		code = codes.Unknown
		if httpStatus >= 400 && httpStatus < 500 {
			code = codes.InvalidArgument
		}
	}
	return status.New(code, message)
}

// GetRetryInfo is the RetryInfo among a status's details, or nil.
func GetRetryInfo(s *status.Status) *errdetails.RetryInfo {
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info
		}
	}
	return nil
}
