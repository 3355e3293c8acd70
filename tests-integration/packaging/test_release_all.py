"""All five packages of this repository's HEAD, released from a clone of it to an index on this machine."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import threading

import pytest
from release import print_status, release
from release_plan import plan_release, read_status


@pytest.fixture
def clone(tmp_path, clone_at):
    return clone_at(tmp_path / "clone")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The address of an index that takes uploads, and the folder where they arrive."""
    folder = tmp_path / "index"
    folder.mkdir()

    class Index(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for part in body.split(b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()):
                head, _, content = part.partition(b"\r\n\r\n")
                if name := re.search(rb'filename="([^"]+)"', head):
                    (folder / name[1].decode()).write_bytes(content.removesuffix(b"\r\n"))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    for name, value in (("USERNAME", "nobody"), ("PASSWORD", "nothing"), ("NON_INTERACTIVE", "1")):
        monkeypatch.setenv(f"TWINE_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()
    server.server_close()


def test_all_packages_are_refused_out_of_order_and_released_in_order(clone, index, coming_versions, tmp_path):
    address, uploaded = index
    environment = tmp_path / "alone"
    settings = {"constraints": os.environ.get("AM_CONSTRAINTS") or None, "environment": environment}
    versions = coming_versions(clone.root)
    assert sorted(versions) == sorted(status.package for status in read_status(clone.root))
    assert all(status.needs_release for status in read_status(clone.root))

    for package, first in (("am-fsdp", "am-tp-styles and then am-tp-plans"), ("am-tp-plans", "am-tp-styles")):
        with pytest.raises(ValueError, match=f"no tagged release is in that range .*; release {first} first") as caught:
            plan_release(clone.root, package, versions[package])
        print(caught.value)

    for package, version in versions.items():
        before = clone.state()
        release(clone.root, package, version, dry_run=True, **settings)
        assert clone.state() == before
        release(clone.root, package, version, upload_to=["--repository-url", address], **settings)
        assert clone.git("rev-parse", f"{package}-v{version}^{{commit}}") == clone.git("rev-parse", "scratch")
        assert clone.git("status", "--porcelain") == ""

    print_status(clone.root)
    assert not any(status.needs_release for status in read_status(clone.root))
    kept = {file.name: file.read_bytes() for file in (clone.root / "build" / "released").iterdir()}
    assert {file.name: file.read_bytes() for file in uploaded.iterdir()} == kept
    assert len(kept) == 2 * len(versions)
    assert installed_from(uploaded, environment) == versions


def installed_from(folder, environment):
    """What of ours is there once the packages that nothing else of ours needs were installed from a folder."""
    pip = [str(environment / "bin" / "python"), "-m", "pip"]
    leaves = ["am-fsdp", "am-moe", "am-pipeline"]
    subprocess.run([*pip, "uninstall", "-qq", "--yes", *leaves, "am-tp-plans", "am-tp-styles"], check=True)
    subprocess.run([*pip, "install", "-q", "--no-index", f"--find-links={folder}", *leaves], check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    return dict(line.split("==") for line in listed.split() if line.startswith("am-"))
