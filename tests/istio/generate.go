// generate MANIFESTS MESHES OUT: what istiod makes of deploy/istio in small meshes, as golden files, by its own generator
// and without a cluster. MESHES/NAME.yaml says in its first comment which manifests and which proxy the mesh has.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"sort"
	"strings"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"

	"istio.io/istio/pilot/pkg/config/kube/extensions"
	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/networking/core"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/kube/krt"
)

// plan is the first comment of a mesh.
type plan struct {
	// Manifests in force, by file name.
	Manifests []string `json:"manifests"`
	// Namespace that the manifests are put in; as they are if empty.
	Namespace string `json:"namespace"`
	// Proxy is sidecar or gateway.
	Proxy string `json:"proxy"`
	// In is the proxy's namespace.
	In string `json:"in"`
	// IPs of the proxy; one of IPv4 if there are none.
	IPs []string `json:"ips"`
	// Labels of the proxy.
	Labels map[string]string `json:"labels"`
	// Mesh is a MeshConfig over istiod's defaults.
	Mesh json.RawMessage `json:"mesh"`
}

// failer ends the program where a test would fail.
type failer struct{ cleanup []func() }

func (*failer) Fail()                     { fatal("failed") }
func (*failer) FailNow()                  { fatal("failed") }
func (*failer) Fatal(args ...any)         { fatal(fmt.Sprint(args...)) }
func (*failer) Fatalf(f string, a ...any) { fatal(fmt.Sprintf(f, a...)) }
func (*failer) Error(args ...any)         { fatal(fmt.Sprint(args...)) }
func (*failer) Errorf(f string, a ...any) { fatal(fmt.Sprintf(f, a...)) }
func (*failer) Log(...any)                {}
func (*failer) Logf(string, ...any)       {}
func (*failer) TempDir() string           { d, _ := os.MkdirTemp("", "istio"); return d }
func (*failer) Helper()                   {}
func (f *failer) Cleanup(what func())     { f.cleanup = append(f.cleanup, what) }
func (*failer) Skip(args ...any)          { fatal(fmt.Sprint(args...)) }

func fatal(what string) {
	fmt.Fprintln(os.Stderr, "generate:", what)
	os.Exit(1)
}

func must[T any](value T, err error) T {
	if err != nil {
		fatal(err.Error())
	}
	return value
}

func version() string {
	info, _ := debug.ReadBuildInfo()
	for _, module := range info.Deps {
		if module.Path == "istio.io/istio" {
			return module.Version
		}
	}
	return "unknown"
}

// stamped is where istiod's own store puts the time in place of the version that an API server gives.
var stamped = regexp.MustCompile(`("ISTIO_META_WASM_PLUGIN_RESOURCE_VERSION": ?")[^"]*`)

// shown is a message as JSON whose text depends on neither the library's mood nor the time.
func shown(message proto.Message) any {
	var out any
	text := must(protojson.MarshalOptions{UseProtoNames: true}.Marshal(message))
	text = stamped.ReplaceAll(text, []byte("${1}1"))
	if err := json.Unmarshal(text, &out); err != nil {
		fatal(err.Error())
	}
	return out
}

func all[M proto.Message](messages []M, name func(M) string) []any {
	sort.SliceStable(messages, func(a, b int) bool { return name(messages[a]) < name(messages[b]) })
	out := []any{}
	for _, message := range messages {
		out = append(out, shown(message))
	}
	return out
}

// discovered are the names that filters of these listeners ask the extension discovery service for.
func discovered(listeners []*listener.Listener) []string {
	names := map[string]bool{}
	for _, l := range listeners {
		for _, chain := range append(l.FilterChains, l.DefaultFilterChain) {
			for _, filter := range chain.GetFilters() {
				if filter.GetConfigDiscovery() != nil {
					names[filter.Name] = true
				}
				manager := &hcm.HttpConnectionManager{}
				if filter.GetTypedConfig() == nil || filter.GetTypedConfig().UnmarshalTo(manager) != nil {
					continue
				}
				for _, inner := range manager.HttpFilters {
					if inner.GetConfigDiscovery() != nil {
						names[inner.Name] = true
					}
				}
			}
		}
	}
	out := []string{}
	for name := range names {
		out = append(out, name)
	}
	sort.Strings(out)
	return out
}

func generate(manifests, path string) []byte {
	text := must(os.ReadFile(path))
	head, _, _ := bytes.Cut(text, []byte("\n"))
	var how plan
	if err := json.Unmarshal(bytes.TrimPrefix(head, []byte("# ")), &how); err != nil {
		fatal(path + ": its first line says how to use it: " + err.Error())
	}
	hash := sha256.New()
	hash.Write(text)
	objects := []string{string(text)}
	for _, name := range how.Manifests {
		manifest := must(os.ReadFile(filepath.Join(manifests, name)))
		hash.Write(manifest)
		in := string(manifest)
		if how.Namespace != "" {
			in = strings.ReplaceAll(in, "namespace: istio-system", "namespace: "+how.Namespace)
		}
		objects = append(objects, in)
	}
	config := mesh.DefaultMeshConfig()
	if len(how.Mesh) > 0 {
		config = must(mesh.ApplyMeshConfig(string(how.Mesh), config))
	}
	result := run(how, config, strings.Join(objects, "\n---\n"))
	result["istio"] = version()
	result["inputs"] = hex.EncodeToString(hash.Sum(nil))
	out := &bytes.Buffer{}
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", " ")
	if err := encoder.Encode(result); err != nil {
		fatal(err.Error())
	}
	return out.Bytes()
}

func run(how plan, config *meshconfig.MeshConfig, objects string) map[string]any {
	t := &failer{}
	updater := model.NewEndpointIndexUpdater(model.NewEndpointIndex(model.DisabledCache{}))
	istiod := core.NewConfigGenTest(t, core.TestOptions{
		ConfigString: objects, MeshConfig: config,
		// Where istiod makes TrafficExtensions of WasmPlugins.
		CreateConfigStore: func(c model.ConfigStoreController) model.ConfigStoreController {
			return extensions.NewController(c, updater, krt.GlobalDebugHandler)
		},
	})
	if len(how.IPs) == 0 {
		how.IPs = []string{"10.1.1.1"}
	}
	kind := model.SidecarProxy
	if how.Proxy == "gateway" {
		kind = model.Router
	}
	proxy := istiod.SetupProxy(&model.Proxy{
		Type: kind, ConfigNamespace: how.In, Labels: how.Labels, IPAddresses: how.IPs,
		Metadata: &model.NodeMetadata{Namespace: how.In, Labels: how.Labels, IstioVersion: "1.31.0"},
	})
	listeners := istiod.Listeners(proxy)
	if how.Proxy != "gateway" {
		// What comes in is none of our business.
		outbound := listeners[:0]
		for _, l := range listeners {
			if l.Name != "virtualInbound" {
				outbound = append(outbound, l)
			}
		}
		listeners = outbound
	}
	names := discovered(listeners)
	found := istiod.ConfigGen.BuildExtensionConfiguration(proxy, istiod.PushContext(), names, nil)
	routes, clusters := istiod.RoutesFromListeners(proxy, listeners), istiod.Clusters(proxy)
	result := map[string]any{
		"listeners":  all(listeners, (*listener.Listener).GetName),
		"routes":     all(routes, protoName),
		"clusters":   all(clusters, protoName),
		"extensions": all(found, protoName),
	}
	for _, done := range t.cleanup {
		done()
	}
	return result
}

func protoName[M interface{ GetName() string }](message M) string { return message.GetName() }

func main() {
	if len(os.Args) != 4 {
		fatal("generate MANIFESTS MESHES OUT")
	}
	for _, path := range must(filepath.Glob(filepath.Join(os.Args[2], "*.yaml"))) {
		name := strings.TrimSuffix(filepath.Base(path), ".yaml") + ".json"
		if err := os.WriteFile(filepath.Join(os.Args[3], name), generate(os.Args[1], path), 0o644); err != nil {
			fatal(err.Error())
		}
		fmt.Println(name)
	}
}
