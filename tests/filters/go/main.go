// A filter in Go, to see that Go's runtime finds what it needs: WASI for output, clocks, randomness and an environment
// without files, and a host that delivers answers to the plugin's context, where Go's SDK looks for them. It declares
// the part of the ABI that it uses itself.
package main

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"time"
	"unsafe"
)

//go:wasmimport env proxy_log
func proxyLog(level uint32, data *byte, size uint32) uint32

//go:wasmimport env proxy_get_header_map_value
func proxyGetHeader(kind uint32, key *byte, keySize uint32, data unsafe.Pointer, size *uint32) uint32

//go:wasmimport env proxy_replace_header_map_value
func proxySetHeader(kind uint32, key *byte, keySize uint32, value *byte, valueSize uint32) uint32

//go:wasmimport env proxy_remove_header_map_value
func proxyRemoveHeader(kind uint32, key *byte, keySize uint32) uint32

//go:wasmimport env proxy_get_buffer_bytes
func proxyGetBuffer(kind, start, max uint32, data unsafe.Pointer, size *uint32) uint32

//go:wasmimport env proxy_set_buffer_bytes
func proxySetBuffer(kind, start, max uint32, data *byte, size uint32) uint32

//go:wasmimport env proxy_http_call
func proxyHTTPCall(cluster *byte, clusterSize uint32, headers *byte, headersSize uint32, body *byte, bodySize uint32,
	trailers *byte, trailersSize uint32, timeout uint32, token *uint32) uint32

//go:wasmimport env proxy_set_effective_context
func proxySetEffectiveContext(id uint32) uint32

//go:wasmimport env proxy_continue_stream
func proxyContinueStream(kind uint32) uint32

const (
	requestHeaders  = 0
	responseHeaders = 2
	requestBody     = 0
	configuration   = 7
	callBody        = 4
	pause           = 1
)

func main() {}

// Contexts of plugins, and which of them a stream belongs to; calls by the plugin that owns them, as Go's SDK has it.
var (
	plugins = map[uint32]map[uint32]uint32{}
	streams = map[uint32]uint32{}
	kept    [][]byte
)

func say(format string, arguments ...any) {
	line := []byte("@@ " + fmt.Sprintf(format, arguments...))
	proxyLog(2, unsafe.SliceData(line), uint32(len(line)))
}

func get(kind uint32, name string) string {
	var data *byte
	var size uint32
	if proxyGetHeader(kind, unsafe.StringData(name), uint32(len(name)), unsafe.Pointer(&data), &size) != 0 {
		return "-"
	}
	return string(unsafe.Slice(data, size))
}

func set(kind uint32, name, value string) {
	proxySetHeader(kind, unsafe.StringData(name), uint32(len(name)), unsafe.StringData(value), uint32(len(value)))
}

func buffer(kind, size uint32) string {
	var data *byte
	var got uint32
	if proxyGetBuffer(kind, 0, size, unsafe.Pointer(&data), &got) != 0 {
		return "-"
	}
	return string(unsafe.Slice(data, got))
}

func pairs(of ...[2]string) []byte {
	out := binary.LittleEndian.AppendUint32(nil, uint32(len(of)))
	for _, pair := range of {
		out = binary.LittleEndian.AppendUint32(out, uint32(len(pair[0])))
		out = binary.LittleEndian.AppendUint32(out, uint32(len(pair[1])))
	}
	for _, pair := range of {
		out = append(out, pair[0]+"\x00"+pair[1]+"\x00"...)
	}
	return out
}

//go:wasmexport proxy_abi_version_0_2_1
func abiVersion() {}

//go:wasmexport proxy_on_memory_allocate
func allocate(size uint32) *byte {
	block := make([]byte, size)
	// The host writes here later; the collector must not take it before.
	kept = append(kept, block)
	if len(kept) > 64 {
		kept = kept[32:]
	}
	return unsafe.SliceData(block)
}

//go:wasmexport proxy_on_context_create
func contextCreate(id, plugin uint32) {
	if plugin == 0 {
		plugins[id] = map[uint32]uint32{}
		return
	}
	if _, known := plugins[plugin]; !known {
		panic("a stream of no plugin")
	}
	streams[id] = plugin
}

//go:wasmexport proxy_on_vm_start
func vmStart(_, _ uint32) uint32 { return 1 }

//go:wasmexport proxy_on_configure
func configure(_, size uint32) uint32 {
	fmt.Println("@@ printed", buffer(configuration, size))
	_, err := os.ReadFile("/etc/passwd")
	random := make([]byte, 16)
	_, failed := rand.Read(random)
	say("file refused %v, random %v, clock %v, environment %d, arguments %d", err != nil,
		failed == nil && !bytes.Equal(random, make([]byte, 16)), time.Now().Year() > 2024, len(os.Environ()), len(os.Args))
	// Other goroutines run while one waits, and a sleep ends.
	done := make(chan string)
	go func() { done <- "goroutine" }()
	say("from a %s", <-done)
	return 1
}

//go:wasmexport proxy_on_request_headers
func onRequestHeaders(id, _, end uint32) uint32 {
	say("%s end %v", get(requestHeaders, ":path"), end != 0)
	name := "content-length"
	proxyRemoveHeader(requestHeaders, unsafe.StringData(name), uint32(len(name)))
	headers := pairs([2]string{":method", "GET"}, [2]string{":path", "/allow"}, [2]string{":authority", "a"})
	cluster, body := "calls", []byte("question")
	var token uint32
	status := proxyHTTPCall(unsafe.StringData(cluster), uint32(len(cluster)), unsafe.SliceData(headers),
		uint32(len(headers)), unsafe.SliceData(body), uint32(len(body)), nil, 0, 5000, &token)
	if status != 0 {
		say("no call: %d", status)
		return 0
	}
	plugins[streams[id]][token] = id
	return pause
}

//go:wasmexport proxy_on_http_call_response
func onCallResponse(plugin, token, _, size, _ uint32) {
	calls, known := plugins[plugin]
	if !known {
		panic("an answer to no plugin")
	}
	proxySetEffectiveContext(calls[token])
	delete(calls, token)
	set(requestHeaders, "x-answer", buffer(callBody, size))
	proxyContinueStream(0)
}

//go:wasmexport proxy_on_request_body
func onRequestBody(_, size, end uint32) uint32 {
	if end == 0 {
		return pause
	}
	changed := strings.ToUpper(buffer(requestBody, size))
	proxySetBuffer(requestBody, 0, size, unsafe.StringData(changed), uint32(len(changed)))
	return 0
}

//go:wasmexport proxy_on_response_headers
func onResponseHeaders(_, _, _ uint32) uint32 {
	set(responseHeaders, "x-go", "was here")
	return 0
}

//go:wasmexport proxy_on_done
func onDone(_ uint32) uint32 { return 1 }

//go:wasmexport proxy_on_delete
func onDelete(id uint32) {
	delete(streams, id)
	say("delete")
}
