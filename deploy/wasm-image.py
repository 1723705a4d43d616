#!/usr/bin/env python3
"""wasm-image.py FILTER.wasm FOLDER: an OCI image layout of the filter, as Istio's agent fetches one (`oci://…`); prints its
digest. No registry is needed to make it. To push it: skopeo copy oci:FOLDER:filter docker://REGISTRY/NAME:TAG"""
import gzip, hashlib, io, json, pathlib, sys, tarfile

# The "compat" variant of wasm images: an image of one layer that holds plugin.wasm. (The variant with media types of its
# own needs two layers for Istio, and registries and tools that know it.)
MANIFEST, INDEX = "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"
CONFIG, LAYER = "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar+gzip"
VARIANT = {"module.wasm.image/variant": "compat"}


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def text(value):
    return json.dumps(value, separators=(",", ":")).encode()


def tar(name, data):
    """Without time or owner: the same filter makes the same image."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def main(wasm, folder):
    folder = pathlib.Path(folder)
    module = pathlib.Path(wasm).read_bytes()
    if module[:4] != b"\0asm":
        sys.exit(f"{wasm}: no wasm module")
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def blob(data, media, **more):
        (blobs / sha256(data)[7:]).write_bytes(data)
        return {"mediaType": media, "digest": sha256(data), "size": len(data), **more}

    layer = tar("plugin.wasm", module)
    config = {"architecture": "wasm", "os": "wasip1", "config": {}, "rootfs": {"type": "layers", "diff_ids": [sha256(layer)]}}
    manifest = blob(text({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": blob(text(config), CONFIG),
        "layers": [blob(gzip.compress(layer, 9, mtime=0), LAYER)], "annotations": VARIANT,
    }), MANIFEST, annotations={"org.opencontainers.image.ref.name": "filter"})
    (folder / "index.json").write_bytes(text({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]}))
    (folder / "oci-layout").write_bytes(text({"imageLayoutVersion": "1.0.0"}))
    print(manifest["digest"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
