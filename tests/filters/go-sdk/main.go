// A filter on the public Go SDK, as anybody's would be. The configuration says what it is: "http" or "tcp".
package main

import (
	"fmt"
	"strings"

	"github.com/proxy-wasm/proxy-wasm-go-sdk/proxywasm"
	"github.com/proxy-wasm/proxy-wasm-go-sdk/proxywasm/types"
)

func main() {}

func init() {
	proxywasm.SetPluginContext(func(uint32) types.PluginContext { return &plugin{} })
}

func say(format string, arguments ...any) {
	proxywasm.LogInfof("@@ "+format, arguments...)
}

type plugin struct {
	types.DefaultPluginContext
	what     string
	queue    uint32
	requests proxywasm.MetricCounter
	waiting  []uint32
}

func (p *plugin) OnPluginStart(int) types.OnPluginStartStatus {
	configuration, err := proxywasm.GetPluginConfiguration()
	if err != nil && err != types.ErrorStatusNotFound {
		return types.OnPluginStartStatusFailed
	}
	p.what = string(configuration)
	p.requests = proxywasm.DefineCounterMetric("go_sdk.requests")
	if p.queue, err = proxywasm.RegisterSharedQueue("go-sdk"); err != nil {
		return types.OnPluginStartStatusFailed
	}
	if err := proxywasm.SetTickPeriodMilliSeconds(20); err != nil {
		return types.OnPluginStartStatusFailed
	}
	say("configure %s", p.what)
	return types.OnPluginStartStatusOK
}

// OnTick lets every request go on that waits.
func (p *plugin) OnTick() {
	for _, id := range p.waiting {
		_ = proxywasm.SetEffectiveContext(id)
		_ = proxywasm.AddHttpRequestHeader("x-waited", "yes")
		say("resumed %v", proxywasm.ResumeHttpRequest())
	}
	p.waiting = nil
}

func (p *plugin) OnQueueReady(queue uint32) {
	message, err := proxywasm.DequeueSharedQueue(queue)
	say("queue %v %s %v", queue == p.queue, message, err)
}

func (p *plugin) NewHttpContext(id uint32) types.HttpContext {
	if p.what == "tcp" {
		return nil
	}
	return &request{plugin: p, id: id}
}

func (p *plugin) NewTcpContext(uint32) types.TcpContext {
	return &connection{}
}

type request struct {
	types.DefaultHttpContext
	plugin *plugin
	id     uint32
	path   string
}

func (r *request) OnHttpRequestHeaders(_ int, end bool) types.Action {
	headers, err := proxywasm.GetHttpRequestHeaders()
	names := make([]string, 0, len(headers))
	for _, header := range headers {
		names = append(names, header[0])
	}
	r.path, _ = proxywasm.GetHttpRequestHeader(":path")
	host, _ := proxywasm.GetHttpRequestHeader("host")
	say("%s of %s, %v, end %v, %v", r.path, host, names, end, err)
	method, err := proxywasm.GetProperty([]string{"request", "method"})
	_, none := proxywasm.GetProperty([]string{"none"})
	say("method %s %v, none %v", method, err, none)
	_ = proxywasm.SetProperty([]string{"own"}, []byte("mine"))
	_ = proxywasm.RemoveHttpRequestHeader("content-length")
	r.plugin.requests.Increment(1)
	value, cas, err := proxywasm.GetSharedData("key")
	say("data %q %v, %v", value, err, proxywasm.SetSharedData("key", append(value, 'x'), cas))
	compressed, err := proxywasm.CallForeignFunction("compress", []byte("hello"))
	say("compressed %x %v", compressed, err)
	switch r.path {
	case "/call":
		return r.call()
	case "/wait":
		r.plugin.waiting = append(r.plugin.waiting, r.id)
		return types.ActionPause
	case "/deny":
		denied := [][2]string{{"x-denied", "1"}}
		if err := proxywasm.SendHttpResponse(403, denied, []byte("no\n"), -1); err != nil {
			panic(err)
		}
		return types.ActionPause
	case "/queue":
		say("enqueued %v", proxywasm.EnqueueSharedQueue(r.plugin.queue, []byte("a message")))
	}
	return types.ActionContinue
}

// call makes two calls; the request goes on with the answer of the second.
func (r *request) call() types.Action {
	headers := [][2]string{{":method", "GET"}, {":path", "/allow"}, {":authority", "a"}}
	pending := 2
	answered := func(headers, size, trailers int) {
		pending--
		body, err := proxywasm.GetHttpCallResponseBody(0, size)
		status, _ := proxywasm.GetHttpCallResponseHeaders()
		say("answer %s %s %v %d", status[0][1], body, err, trailers)
		if pending == 0 {
			_ = proxywasm.ReplaceHttpRequestHeader("x-answer", string(body))
			_ = proxywasm.ResumeHttpRequest()
		}
	}
	for range pending {
		if _, err := proxywasm.DispatchHttpCall("calls", headers, []byte("q"), nil, 5000, answered); err != nil {
			say("no call: %v", err)
			return types.ActionContinue
		}
	}
	_, err := proxywasm.DispatchHttpCall("none", headers, nil, nil, 5000, answered)
	say("call to none: %v", err)
	return types.ActionPause
}

func (r *request) OnHttpRequestBody(size int, end bool) types.Action {
	if !end {
		return types.ActionPause
	}
	body, err := proxywasm.GetHttpRequestBody(0, size)
	say("body %s %v", body, err)
	_ = proxywasm.AppendHttpRequestBody([]byte("[appended]"))
	_ = proxywasm.PrependHttpRequestBody([]byte("[prepended]"))
	return types.ActionContinue
}

func (r *request) OnHttpResponseHeaders(int, bool) types.Action {
	status, err := proxywasm.GetHttpResponseHeader(":status")
	own, _ := proxywasm.GetProperty([]string{"own"})
	say("status %s %v, own %s", status, err, own)
	_ = proxywasm.AddHttpResponseHeader("x-go-sdk", fmt.Sprint(len(status)))
	_ = proxywasm.RemoveHttpResponseHeader("content-length")
	return types.ActionContinue
}

func (r *request) OnHttpResponseBody(size int, end bool) types.Action {
	if !end {
		return types.ActionPause
	}
	body, err := proxywasm.GetHttpResponseBody(0, size)
	if err == nil {
		_ = proxywasm.ReplaceHttpResponseBody([]byte(strings.ToUpper(string(body))))
	}
	return types.ActionContinue
}

func (r *request) OnHttpStreamDone() {
	say("done %s", r.path)
}

type connection struct {
	types.DefaultTcpContext
}

func (c *connection) OnNewConnection() types.Action {
	say("new")
	return types.ActionContinue
}

func (c *connection) OnDownstreamData(size int, end bool) types.Action {
	if size == 0 {
		return types.ActionContinue
	}
	data, err := proxywasm.GetDownstreamData(0, size)
	say("downstream %q %v", data, err)
	_ = proxywasm.ReplaceDownstreamData([]byte(strings.ToUpper(string(data))))
	return types.ActionContinue
}

func (c *connection) OnUpstreamData(size int, end bool) types.Action {
	if size == 0 {
		return types.ActionContinue
	}
	data, err := proxywasm.GetUpstreamData(0, size)
	say("upstream %q %v", data, err)
	_ = proxywasm.AppendUpstreamData([]byte("!"))
	return types.ActionContinue
}

func (c *connection) OnDownstreamClose(by types.PeerType) {
	say("downstream close %d", by)
}

func (c *connection) OnStreamDone() {
	say("delete")
}
