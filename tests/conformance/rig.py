#!/usr/bin/env python3
"""rig.py: runs conformance cases against a proxy.

  rig.py check SUT CASE...     start `SUT CASE` for each case folder, send the case's probes, compare with expected.json
  rig.py show SUT CASE...      the same, printing what each probe showed

One network namespace is made per run. In it every TCP connection of the client is redirected to the proxy
(0.0.0.0:15001, SO_ORIGINAL_DST tells where it was meant to go), and every TCP connection of the proxy (user id 1337)
is redirected to an echo server that says what arrived and where it was meant to go. README.md describes the case
format and the comparison. Needs root, iproute2, iptables, openssl, Python 3.9+ with pyyaml and h2.
"""
import fcntl, hashlib, json, os, re, signal, socket, ssl, struct, subprocess, sys, threading, time
import yaml

NS, UID, ECHO, PROXY = "rig%d" % os.getpid(), 1337, 19999, 15001
CERTS = "/tmp/rig-certs"
SO_ORIGINAL_DST = 80
RANDOM = b"\x11" * 32                                   # marks the client's hand-made ClientHello


def sh(cmd):
    subprocess.run(cmd, shell=True, check=True, stdout=subprocess.DEVNULL)


# --- names and addresses -------------------------------------------------------------------------------------------
def name_ips(name):
    """The DNS of the rig: what every name resolves to."""
    name = name.lower().rstrip(".")
    if "nxdomain" in name or name.endswith("svc.cluster.local"):
        return []
    h = hashlib.sha256(name.encode()).digest()
    if "refused" in name:                               # connections there are refused
        return [f"198.51.100.{h[0] or 1}"]
    if "blackhole" in name:                             # connections there hang
        return [f"203.0.113.{h[0] or 1}"]
    n = 3 if name.startswith("multi") else 1
    return [f"198.18.{h[2*i]}.{h[2*i+1] or 1}" for i in range(n)]


def setup():
    os.makedirs(f"/etc/netns/{NS}", exist_ok=True)
    open(f"/etc/netns/{NS}/resolv.conf", "w").write("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    sh(f"ip netns add {NS}")
    out = "iptables -t nat -A OUTPUT -p tcp"
    for c in ["ip link set lo up", "ip route add local 0.0.0.0/0 dev lo",
              "sysctl -qw net.ipv4.ip_unprivileged_port_start=0",
              "iptables -A OUTPUT -p tcp -d 203.0.113.0/24 -j DROP",
              f"{out} -m owner --uid-owner {UID} -d 127.0.0.1 --dport 15010:15029 -j RETURN",  # its own parts to each other
              f"{out} -m owner --uid-owner {UID} -d 198.51.100.0/24 -j REDIRECT --to-ports 1",
              f"{out} -m owner --uid-owner {UID} -d 203.0.113.0/24 -j RETURN",
              f"{out} -m owner --uid-owner {UID} -j REDIRECT --to-ports {ECHO}",
              f"{out} -d 127.0.0.1 -j RETURN",
              f"{out} -j REDIRECT --to-ports {PROXY}"]:
        sh(f"ip netns exec {NS} {c}")
    certs()


def teardown():
    subprocess.run(f"ip netns del {NS}; rm -rf /etc/netns/{NS} /tmp/{NS}.*", shell=True)


def certs():
    """A CA, a server certificate for the echo and a client certificate, where the cases' resources expect them."""
    lock = open(f"{CERTS}.lock", "w")                   # several rigs may start at a time
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.path.exists(f"{CERTS}/mesh/done"):
        return
    os.makedirs(CERTS, exist_ok=True)
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    san = "DNS:example.com,DNS:*.example.com,DNS:*.tls.test,URI:spiffe://cluster.local/ns/ext/sa/echo"
    sh(f"""cd {CERTS} && openssl req -x509 {key} -days 3650 -subj /CN=rig-ca -keyout ca-key.pem -out ca.pem 2>&1
           openssl req -x509 {key} -days 3650 -subj /CN=other-ca -keyout other-key.pem -out other-ca.pem 2>&1
           printf 'subjectAltName=%s' '{san}' > san
           for n in server client; do
             openssl req {key} -subj /CN=rig-$n -keyout $n-key.pem -out $n.csr 2>&1
             openssl x509 -req -in $n.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 3650 -extfile san -out $n.pem 2>&1
           done; chmod 644 *; touch done
           mkdir -p mesh; cp client.pem mesh/cert-chain.pem; cp client-key.pem mesh/key.pem; cp ca.pem mesh/root-cert.pem; touch mesh/done""")


# --- TLS client hello ----------------------------------------------------------------------------------------------
def client_hello(sni, alpn=None):
    ext = b""
    if sni:
        n = sni.encode()
        ext += struct.pack("!HHHBH", 0, len(n) + 5, len(n) + 3, 0, len(n)) + n
    ext += struct.pack("!HHBH", 43, 3, 2, 0x0304)
    ext += struct.pack("!HHHH", 10, 4, 2, 29)
    ext += struct.pack("!HHHH", 13, 4, 2, 0x0403)
    if alpn:
        p = b"".join(bytes([len(a)]) + a.encode() for a in alpn)
        ext += struct.pack("!HHH", 16, len(p) + 2, len(p)) + p
    ext += struct.pack("!HHH", 51, 38, 36) + struct.pack("!HH", 29, 32) + b"\x42" * 32
    body = b"\x03\x03" + RANDOM + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00" + struct.pack("!H", len(ext)) + ext
    hs = b"\x01" + struct.pack("!I", len(body))[1:] + body
    return b"\x16\x03\x01" + struct.pack("!H", len(hs)) + hs


def sni_of(b):
    try:
        i = 5 + 4 + 2 + 32
        i += 1 + b[i]
        i += 2 + struct.unpack("!H", b[i:i+2])[0]
        i += 1 + b[i]
        end = i + 2 + struct.unpack("!H", b[i:i+2])[0]
        i += 2
        while i < end:
            t, l = struct.unpack("!HH", b[i:i+4])
            if t == 0:
                return b[i+9:i+4+l].decode()
            i += 4 + l
    except Exception:
        pass
    return ""


def joined(headers):
    """A header that comes twice counts as one with both values."""
    hs = {}
    for k, v in headers:
        k, v = k.lower(), v.strip()
        hs[k] = hs[k] + "," + v if k in hs else v
    return hs


# --- the echo server (inside the namespace) ------------------------------------------------------------------------
class Echo:
    """Accepts whatever the proxy opens, notes it in `log`, and answers with the note as JSON."""
    def __init__(self):
        self.log, self.lock, self.unix = [], threading.Lock(), {}
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(f"{CERTS}/server.pem", f"{CERTS}/server-key.pem")
        self.tls.load_verify_locations(f"{CERTS}/ca.pem")
        self.tls.verify_mode = ssl.CERT_OPTIONAL
        self.tls.set_alpn_protocols(["h2", "http/1.1"])
        for fam, addr in ((socket.AF_INET, "0.0.0.0"),):
            s = socket.socket(fam)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((addr, ECHO))
            self.serve(s, None)

    def serve(self, s, name):
        s.listen(512)
        def accept():
            while True:
                try:
                    c, _ = s.accept()
                except OSError:
                    return
                threading.Thread(target=self.handle, args=(c, name), daemon=True).start()
        threading.Thread(target=accept, daemon=True).start()

    def listen_unix(self, paths):
        for s, p in self.unix.values():
            s.close()
            os.unlink(p)
        self.unix = {}
        for p in paths:
            os.makedirs(os.path.dirname(p), exist_ok=True)
            if os.path.exists(p):
                os.unlink(p)
            s = socket.socket(socket.AF_UNIX)
            s.bind(p)
            os.chmod(p, 0o777)
            self.serve(s, "unix:" + p)
            self.unix[p] = (s, p)

    def note(self, entry):
        with self.lock:
            self.log.append(entry)
        return json.dumps(entry).encode()

    def handle(self, c, name):
        try:
            if name:
                dst = name
            else:
                o = c.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
                dst = f"{socket.inet_ntoa(o[4:8])}:{struct.unpack('!H', o[2:4])[0]}"
            base = {"dst": dst}
            c.settimeout(0.7)
            try:
                first = c.recv(65536, socket.MSG_PEEK)
            except socket.timeout:                      # nobody speaks: a server-first protocol's moment
                c.sendall(self.note(dict(base, kind="silent")) + b"\n")
                return
            if not first:
                return
            c.settimeout(20)
            if first[:1] == b"\x16":
                need = 5 + struct.unpack("!H", first[3:5])[0] if len(first) >= 5 else 5
                end = time.time() + 1
                while len(first) < need and time.time() < end:
                    first = c.recv(65536, socket.MSG_PEEK)
                if RANDOM in first[:64]:                # the client's own hello came through untouched
                    c.sendall(self.note(dict(base, kind="tls", sni=sni_of(first))) + b"\n")
                    c.recv(65536)
                    return
                c = self.tls.wrap_socket(c, server_side=True)
                base["tls"] = {"sni": sni_of(first)}
                cert = c.getpeercert()
                if cert:
                    base["tls"]["client"] = dict(x[0] for x in cert["subject"])["commonName"]
            self.speak(c, base)
        except Exception:
            pass
        finally:
            c.close()

    def speak(self, c, base):
        buf = b""
        while True:
            d = c.recv(65536)
            if not d:
                return
            buf += d
            proxied = re.match(rb"PROXY (TCP\d) \S+ \S+ \d+ \d+\r\n", buf)
            if proxied:
                base["proxied"], buf = proxied[1].decode(), buf[proxied.end():]
            elif buf[:12] == b"\r\n\r\n\x00\r\nQUIT\n" and len(buf) >= 16 + int.from_bytes(buf[14:16], "big"):
                base["proxied"], buf = "v2", buf[16 + int.from_bytes(buf[14:16], "big"):]
            if "proxied" in base and not buf:
                continue
            if b"PRI * HTTP/2.0".startswith(buf[:14]):
                if len(buf) >= 14:
                    return self.speak_h2(c, base, buf)
                continue
            if base.get("connect") and buf[:1] == b"\x16":
                c.sendall(self.note(dict(base, kind="tls", sni=sni_of(buf))) + b"\n")
                return
            if not re.match(rb"^[A-Z]+ [^\r\n]+ HTTP/1", buf):
                if re.match(rb"^[A-Z]+ [^\r\n]*$", buf) and b"/" in buf:
                    continue
                c.sendall(self.note(dict(base, kind="tcp", data=buf[:64].decode("latin1"))) + b"\n")
                return
            while b"\r\n\r\n" in buf:
                head, _, rest = buf.partition(b"\r\n\r\n")
                lines = head.decode("latin1").split("\r\n")
                method, path, _ = lines[0].split(" ", 2)
                hs = joined(l.split(":", 1) for l in lines[1:])
                n = int(hs.get("content-length", 0))
                while len(rest) < n:
                    rest += c.recv(65536)
                buf = rest[n:]
                if method == "CONNECT":                 # a tunnel: what comes through it is noted with its target
                    base["connect"] = path
                    c.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    continue
                code, extra, body = self.answer(dict(base, kind="http", http="1.1", method=method, path=path,
                                                     host=hs.get("host", ""), headers=hs))
                c.sendall(b"HTTP/1.1 %d X\r\n" % code + b"".join(b"%s: %s\r\n" % (k.encode(), v.encode()) for k, v in extra) +
                          b"content-length: %d\r\n\r\n" % len(body) + (body if method != "HEAD" else b""))

    def speak_h2(self, c, base, buf):
        from h2 import config, connection, events
        h = connection.H2Connection(config.H2Configuration(client_side=False, header_encoding="utf-8"))
        h.initiate_connection()
        c.sendall(h.data_to_send())
        reqs = {}
        while True:
            for e in h.receive_data(buf):
                if isinstance(e, events.RequestReceived):
                    reqs[e.stream_id] = joined(e.headers)
                elif isinstance(e, events.DataReceived):
                    h.acknowledge_received_data(e.flow_controlled_length, e.stream_id)
                elif isinstance(e, events.StreamEnded):
                    q = reqs.pop(e.stream_id)
                    code, extra, body = self.answer(dict(
                        base, kind="http", http="2", method=q[":method"], path=q[":path"], host=q.get(":authority", ""),
                        headers={k: v for k, v in q.items() if k[0] != ":"}))
                    h.send_headers(e.stream_id, [(":status", str(code))] + extra)
                    grpc = q.get("content-type", "").startswith("application/grpc")
                    h.send_data(e.stream_id, body, end_stream=not grpc)
                    if grpc:
                        h.send_headers(e.stream_id, [("grpc-status", "0")], end_stream=True)
                elif isinstance(e, events.ConnectionTerminated):
                    return
            c.sendall(h.data_to_send())
            buf = c.recv(65536)
            if not buf:
                return

    def answer(self, entry):
        """?status=503 asks for that status, ?delay=2 for a pause, ?fail=2 for 503 the first two times that path is seen."""
        body = self.note(entry)
        q = dict(x.split("=", 1) for x in entry["path"].partition("?")[2].split("&") if "=" in x)
        if "delay" in q:
            time.sleep(float(q["delay"]))
        code = int(q.get("status", 200))
        if "fail" in q:
            with self.lock:
                seen = sum(1 for e in self.log if e.get("path") == entry["path"])
            code = 503 if seen <= int(q["fail"]) else 200
        extra = [("content-type", "application/json"), ("x-echo", "yes")]
        return code, extra, body


def dns_server():
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    u.bind(("127.0.0.1", 53))
    def serve():
        while True:
            q, a = u.recvfrom(4096)
            try:
                i, labels = 12, []
                while q[i]:
                    labels.append(q[i+1:i+1+q[i]].decode())
                    i += 1 + q[i]
                qend = i + 5
                qt = struct.unpack("!H", q[i+1:i+3])[0]
                ips = name_ips(".".join(labels))
                ans = [b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 300, 4) + socket.inet_aton(x) for x in ips] if qt == 1 else []
                u.sendto(q[:2] + struct.pack("!HHHHH", 0x8180 | (0 if ips else 3), 1, len(ans), 0, 0) +
                         q[12:qend] + b"".join(ans), a)
            except Exception:
                pass
    threading.Thread(target=serve, daemon=True).start()


# --- the client (inside the namespace) -----------------------------------------------------------------------------
def request_h1(s, p, hs):
    target = p.get("target") or p.get("path", "/")
    body = p.get("body", "").encode()
    if p.get("host") is not None:
        hs = {"Host": p["host"], **hs}
    if body:
        hs["Content-Length"] = str(len(body))
    s.sendall((f"{p.get('method', 'GET')} {target} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in hs.items()) +
               "Connection: close\r\n\r\n").encode() + body)
    buf = b""
    while True:
        try:
            d = s.recv(65536)
        except (ConnectionError, ssl.SSLError):
            d = b""
        buf += d
        head, end, body = buf.partition(b"\r\n\r\n")
        n = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if not d or end and (p.get("method") in ("CONNECT", "HEAD") or n and len(body) >= int(n.group(1))
                             or body.endswith(b"0\r\n\r\n") and b"chunked" in head.lower()):
            break
    m = re.match(rb"HTTP/1\.\d (\d+)", head)
    if not m:
        return "closed", {}, ""
    hs = joined(l.split(":", 1) for l in head.decode("latin1").split("\r\n")[1:])
    return int(m.group(1)), hs, body.decode("latin1")


def request_h2(s, p, hs):
    from h2 import config, connection, events
    h = connection.H2Connection(config.H2Configuration(client_side=True, header_encoding="utf-8"))
    h.initiate_connection()
    h.send_headers(1, [(":method", p.get("method", "GET")), (":scheme", "http"), (":authority", p.get("host", "")),
                       (":path", p.get("path", "/"))] + [(k.lower(), str(v)) for k, v in hs.items()], end_stream=True)
    s.sendall(h.data_to_send())
    status, rh, body = "closed", {}, b""
    while True:
        try:
            d = s.recv(65536)
        except ConnectionError:
            d = b""
        if not d:
            return status, rh, body.decode("latin1")
        for e in h.receive_data(d):
            if isinstance(e, (events.ResponseReceived, events.TrailersReceived)):
                rh.update({k: v for k, v in dict(e.headers).items() if k[0] != ":"})
                status = int(dict(e.headers).get(":status", status))
            elif isinstance(e, events.DataReceived):
                body += e.data
                h.acknowledge_received_data(e.flow_controlled_length, 1)
            elif isinstance(e, (events.StreamEnded, events.StreamReset, events.ConnectionTerminated)):
                return status, rh, body.decode("latin1")
        s.sendall(h.data_to_send())


def probe(p, echo, i):
    with echo.lock:
        mark = len(echo.log)
    out, proto, t0 = {}, p.get("proto", "http"), time.time()
    ip, port = p["dst"].rsplit(":", 1) if not p["dst"].startswith("unix:") else (None, p["dst"][5:])
    hs = {k: str(v).replace("{i}", str(i)) for k, v in (p.get("headers") or {}).items()}
    s = None
    try:
        if ip is None:
            s = socket.socket(socket.AF_UNIX)
            s.connect(port.replace("@", "\0", 1) if port.startswith("@") else port)
        else:
            s = socket.create_connection(("127.0.0.1" if ip == "proxy" else ip, int(port)), timeout=5)
        s.settimeout(p.get("wait", 3))
        if proto == "https":
            x = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            x.check_hostname, x.verify_mode = False, ssl.CERT_NONE
            if p.get("cert"):
                x.load_cert_chain(f"{CERTS}/{p['cert']}.pem", f"{CERTS}/{p['cert']}-key.pem")
            s = x.wrap_socket(s, server_hostname=p.get("sni"))
        if proto in ("http", "https", "h2"):
            out["status"], rh, body = (request_h2 if proto == "h2" else request_h1)(s, p, hs)
            if "location" in rh:
                out["location"] = rh["location"]
            for h in p.get("expect_headers", []):
                v = rh.get(h.lower())
                out["h:" + h] = re.sub("=[^;]*", "=*", v, 1) if v and h.lower() == "set-cookie" else v
            if p.get("expect_body"):
                out["body"] = body
        else:
            data = client_hello(p.get("sni"), p.get("alpn")) if proto == "tls" else p.get("data", "hello\n").encode()
            if data:
                s.sendall(data)
            buf = b""
            while b"\n" not in buf:
                d = s.recv(65536)
                if not d:
                    break
                buf += d
            out["status"] = "reply" if buf else "closed"
            if buf.startswith(b"HTTP/1"):
                out["status"] = int(buf[9:12])
    except socket.timeout:
        out["status"] = "timeout"
    except OSError:
        out["status"] = "closed"
    finally:
        if s:
            s.close()
    if p.get("timed"):
        out["seconds"] = int(time.time() - t0 + 0.5)
    if os.environ.get("RIG_TIME"):
        print(f"{time.time()-t0:.2f}s {p}", file=sys.stderr)
    time.sleep(p.get("settle", 0.003 if "n" in p else 0.01))
    with echo.lock:
        ups = [dict(e) for e in echo.log[mark:]]
    for u in ups:
        if "headers" in u:
            u["headers"] = {k: v for k, v in u["headers"].items()
                            if k.startswith("x-probe") or k in [x.lower() for x in p.get("show", [])]}
    out["upstream"] = ups
    return out


def summary(p, results):
    """What n tries of one probe showed: the set of statuses and the set of upstream requests."""
    d = {"status": sorted({str(r["status"]) for r in results})}
    if p.get("distinct"):
        d["distinct"] = len({u["dst"] for r in results for u in r["upstream"]})
    else:
        seen = [json.dumps(u, sort_keys=True) for r in results for u in r["upstream"]]
        d["upstream"] = [json.loads(u) for u in sorted(set(seen))]
        if len(results) == 1:
            for u in d["upstream"]:
                times = seen.count(json.dumps(u, sort_keys=True))
                if times > 1:
                    u["times"] = times
    for r in results:
        for k in r:
            if k not in ("status", "upstream"):
                d[k] = sorted({str(x.get(k)) for x in results})
    return d


def tries(p, echo):
    out = []
    for i in range(p.get("n", 1)):
        out.append(probe(p, echo, i))
        if out[-1]["status"] == "timeout":
            break
    return out


def inside():
    """Runs in the namespace: one JSON line of {probes, unix} in, one JSON line of summaries out."""
    echo = Echo()
    dns_server()
    print("up", flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        echo.listen_unix(case["unix"])
        if "probes" not in case:
            print("{}", flush=True)
            continue
        echo.log.clear()
        print(json.dumps([summary(p, tries(p, echo)) for p in case["probes"]]), flush=True)
    echo.listen_unix([])


# --- running a case ------------------------------------------------------------------------------------------------
class Rig:
    def __enter__(self):
        setup()
        self.p = subprocess.Popen(["ip", "netns", "exec", NS, sys.executable, os.path.abspath(__file__), "inside"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.p.stdout.readline().strip() == "up"
        return self

    def __exit__(self, *a):
        self.p.stdin.close()
        try:
            self.p.wait(3)
        except subprocess.TimeoutExpired:
            self.p.kill()
        teardown()

    def ask(self, o):
        self.p.stdin.write(json.dumps(o) + "\n")
        self.p.stdin.flush()
        return json.loads(self.p.stdout.readline())

    def wait_ports(self, ports, proc, limit=15):
        """Until the proxy listens on the first of these ports."""
        end = time.time() + limit
        while time.time() < end and proc.poll() is None:
            r = subprocess.run(["ip", "netns", "exec", NS, "ss", "-Hltn"], capture_output=True, text=True)
            if any(f":{p} " in r.stdout for p in ports):
                return True
            time.sleep(0.03)
        return False

    def run(self, cmd, case, warm=0.6):
        """Starts cmd as the proxy of the case and probes it: (results, None) or (None, what it said)."""
        spec = yaml.safe_load(open(f"{case}/case.yaml"))
        probes = spec["probes"]
        # Those that are dialled are the proxy's own.
        own = {p["dst"].removeprefix("unix:") for p in probes}
        unix = sorted(set(re.findall(r"unix://(/[^\s\"',}]+)", open(f"{case}/config.yaml").read())) - own)
        ports = [PROXY]
        if (spec.get("proxy") or {}).get("type") == "router":
            ports = sorted({p["dst"].rsplit(":", 1)[1] for p in probes if p["dst"].startswith("proxy:")})
        self.ask({"unix": unix})
        log = f"/tmp/{NS}.log"
        with open(log, "w") as f:
            # it may read what root may, wherever the project and its tools lie
            caps = "+dac_override,+dac_read_search"
            user = ["setpriv", "--reuid", str(UID), "--clear-groups", "--inh-caps", caps, "--ambient-caps", caps]
            proc = subprocess.Popen(["ip", "netns", "exec", NS] + user + cmd, stdout=f, stderr=subprocess.STDOUT,
                                    start_new_session=True)
        try:
            if not self.wait_ports(ports, proc):
                return None, open(log).read()[-3000:] or "no output"
            time.sleep(warm)
            return self.ask({"unix": unix, "probes": probes}), None
        finally:
            try:
                os.killpg(proc.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            proc.wait()


def check(sut, cases, show=False):
    total = good = skipped = 0
    failed = []
    with Rig() as rig:
        for case in cases:
            case = case.rstrip("/")
            want = json.load(open(f"{case}/expected.json"))
            probes = yaml.safe_load(open(f"{case}/case.yaml"))["probes"]
            got, err = rig.run([os.path.abspath(sut), os.path.abspath(case)], case)
            total += len(want)
            if err:
                print(f"{case}: did not start: {err[-300:]}")
                failed.append(case)
                continue
            passed = meant = 0
            for p, w, g in zip(probes, want, got):
                if show:
                    print(f"{case}: {json.dumps(p)}\n   {json.dumps(g)}")
                if w == g:
                    passed += 1
                elif "difference" in p:
                    meant += 1
                else:
                    print(f"{case}: {json.dumps(p)}\n   expected {json.dumps(w)}\n   here     {json.dumps(g)}")
            good += passed
            skipped += meant
            if passed + meant < len(want):
                failed.append(case)
    print(f"probes: {good} passed, {total-good-skipped} failed, {skipped} skipped")
    print(f"{len(cases)-len(failed)} passed, {len(failed)} failed, 0 skipped")
    return not failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        inside()
    elif len(sys.argv) > 3 and sys.argv[1] in ("check", "show"):
        sys.exit(0 if check(sys.argv[2], sys.argv[3:], sys.argv[1] == "show") else 1)
    else:
        sys.exit(__doc__)
