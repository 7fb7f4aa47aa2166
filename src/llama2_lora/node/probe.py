"""What a node says of itself: GPUs, links, disks, clock and mounted files, as plain values (JSON).

`probe()` runs on every node; verdict.py judges what all of them say. A command that a site lacks, or that prints something
else than expected, gives None, never a guess.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import xml.etree.ElementTree as ET
from importlib import metadata
from pathlib import Path
from typing import Any

from llama2_lora.data import inspection, packed

GIB = 2**30
# Event reasons that slow a GPU down for its health. Idle, application clocks and the power cap are normal.
THROTTLES = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "transformer_engine", "mlperf-logging")


# ---- Probe: on every node --------------------------------------------------------------------------------------------


def run(*command: str) -> str | None:
    """A command's output, or None where it is absent, fails or takes more than a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def probe(node: int, nodes: int, rendezvous: str, platform: str, paths: dict[str, Path]) -> dict[str, Any]:
    """What this node says of itself. `paths`: data, checkpoint and results; `rendezvous`: HOST:PORT on node 0."""
    seen: dict[str, Any] = {"node": node, "host": socket.gethostname()}
    if platform == "gpu":
        seen["gpu"] = parse_nvidia_smi(run("nvidia-smi", "-q", "-x"))
        seen["cuda"] = cuda_toolkit(Path("/usr/local/cuda"))
        seen["nvlink"] = parse_nvlink(run("nvidia-smi", "nvlink", "--status"))
        seen["infiniband"] = parse_ibstat(run("ibstat"))
    seen["software"] = _versions()
    seen["shared_memory_gib"] = _free_gib(Path("/dev/shm"))
    seen["results_gib"] = _free_gib(paths["results"])
    seen["results_writable"] = _writable(paths["results"])
    seen["data"] = _data_files(paths["data"], platform == "gpu")
    seen["checkpoint"] = _folder_sizes(paths["checkpoint"])
    seen["clock"] = measure_clock(node, nodes, rendezvous)
    return seen


def cuda_toolkit(folder: Path) -> dict[str, Any]:
    """CUDA of the image, and whether it holds the compat package, which brings a newer libcuda than the driver's."""
    try:
        version = json.loads((folder / "version.json").read_text())["cuda"]["version"]
    except (OSError, ValueError, KeyError):
        version = None
    return {"version": version, "compat": any(folder.glob("compat/**/libcuda.so*"))}


def _versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "none"
    return installed


def _free_gib(path: Path) -> float | None:
    try:
        return shutil.disk_usage(path).free / GIB
    except OSError:
        return None


def _writable(folder: Path) -> bool:
    """Really write: permission bits say little of NFS, quotas and read-only mounts."""
    name = folder / f".probe_{socket.gethostname()}_{os.getpid()}"
    try:
        name.write_bytes(b"x")
        name.unlink()
    except OSError:
        return False
    return True


def _data_files(folder: Path, gpu: bool) -> dict[str, Any]:
    """Sizes; of files that have the right ones, every byte is looked at: the caches are dropped afterwards."""
    try:
        sizes = {name: (folder / name).stat().st_size for name in ("train.npy", "validation.npy")}
        manifest = packed.read_manifest(folder)
    except (OSError, ValueError) as error:
        return {"error": str(error)}
    expected = {name: entry["bytes"] for name, entry in manifest["files"].items()} if manifest else None
    if expected in (None, sizes) and (problems := inspection.problems(folder, gpu)):
        return {"error": "; ".join(problems)}
    return {"bytes": sizes, "manifest": expected}


def _folder_sizes(folder: Path) -> dict[str, Any]:
    """Count and bytes of all files: the same on every node, or a node sees another folder."""
    missing = [name for name in ("context/model.yaml", "weights/metadata.json") if not (folder / name).is_file()]
    if missing:
        return {"error": f"{folder}: has no {' and no '.join(missing)}"}
    sizes = [(Path(top) / name).stat().st_size for top, _, names in os.walk(folder) for name in names]
    return {"files": len(sizes), "bytes": sum(sizes)}


def measure_clock(node: int, nodes: int, rendezvous: str, timeout_seconds: float = 60) -> dict[str, Any]:
    """This node's clock minus node 0's, in seconds, as NTP does it: half the difference of the two one-way delays, from
    the fastest of five round trips. Also proves that this node reaches node 0 by TCP, as training will have to."""
    host, _, port = rendezvous.rpartition(":")
    try:
        if node == 0:
            _serve_clock(int(port), nodes - 1, timeout_seconds)
            return {"offset_seconds": 0.0}
        with _connect(host, int(port), timeout_seconds) as connection:
            return {"offset_seconds": min(_round_trip(connection) for _ in range(5))[1]}
    except OSError as error:
        who = "waiting for the other nodes" if node == 0 else f"connecting to node 0 at {rendezvous}"
        return {"error": f"{who}: {error}"}


def _serve_clock(port: int, clients: int, timeout_seconds: float) -> None:
    with socket.create_server(("", port), backlog=max(clients, 1)) as server:
        server.settimeout(timeout_seconds)
        for _ in range(clients):
            connection, _ = server.accept()
            with connection:
                connection.settimeout(timeout_seconds)
                while connection.recv(1):
                    connection.sendall(f"{time.time():20.6f}".encode())


def _connect(host: str, port: int, timeout_seconds: float) -> socket.socket:
    deadline = time.monotonic() + timeout_seconds
    while True:  # node 0 may start later than this one
        try:
            return socket.create_connection((host, port), timeout=timeout_seconds)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _round_trip(connection: socket.socket) -> tuple[float, float]:
    sent = time.time()
    connection.sendall(b"?")
    answer = b""
    while len(answer) < 20:
        if not (part := connection.recv(20 - len(answer))):
            raise ConnectionError("node 0 closed the connection")
        answer += part
    received = time.time()
    return received - sent, (sent + received) / 2 - float(answer)


# ---- Parsers: None for what is absent or not understood --------------------------------------------------------------


def parse_nvidia_smi(xml: str | None) -> dict[str, Any] | None:
    """`nvidia-smi -q -x`: driver, its CUDA, and what is judged of each GPU. Drivers before 535 say throttle reasons."""
    try:
        root = ET.fromstring(xml or "")
    except ET.ParseError:
        return None
    gpus = [_parse_gpu(gpu) for gpu in root.iter("gpu")]
    return {"driver": root.findtext("driver_version", ""), "cuda": root.findtext("cuda_version", ""), "gpus": gpus}


def _parse_gpu(gpu: ET.Element) -> dict[str, Any]:
    def number(path: str) -> float | None:
        match = re.match(r"[\d.]+", gpu.findtext(path, "").strip())
        return float(match[0]) if match else None

    ecc = [number(f"ecc_errors/volatile/{kind}") for kind in ("dram_uncorrectable", "sram_uncorrectable")]
    ecc += [number(f"ecc_errors/volatile/sram_uncorrectable_{kind}") for kind in ("parity", "secded")]
    reasons = [
        e.tag
        for tag in ("clocks_event_reasons", "clocks_throttle_reasons")
        for e in gpu.findall(f"{tag}/*")
        if e.text == "Active"
    ]
    domain = [gpu.findtext(f"fabric/{name}", "N/A").strip() for name in ("clusterUuid", "cliqueId")]
    total, used = number("fb_memory_usage/total"), number("fb_memory_usage/used")
    return {
        "name": gpu.findtext("product_name", ""),
        "memory_gib": total / 1024 if total else None,
        "used_gib": used / 1024 if used is not None else None,
        "temperature": number("temperature/gpu_temp"),
        "max_sm_mhz": number("max_clocks/sm_clock"),
        "application_mhz": number("applications_clocks/graphics_clock"),
        "throttles": [name for name in THROTTLES if any(tag.endswith(f"reason_{name}") for tag in reasons)],
        "ecc_uncorrectable": sum(n for n in ecc if n is not None) if any(n is not None for n in ecc) else None,
        "remap_pending": "Yes" in (gpu.findtext(f"remapped_rows/remapped_row_{s}", "") for s in ("pending", "failure")),
        "mig": gpu.findtext("mig_mode/current_mig", "") == "Enabled",
        "fabric": (gpu.findtext("fabric/state", "N/A"), gpu.findtext("fabric/status", "N/A")),
        # GPUs of one value reach each other over NVLink, on other nodes too; DGX systems have no cluster: all zeros, or N/A
        "nvlink_domain": None if domain[0] == "N/A" or set(domain[0]) <= set("0-") else "/".join(domain),
    }


def parse_nvlink(text: str | None) -> list[list[float]] | None:
    """`nvidia-smi nvlink --status`: GB/s of every link of every GPU; 0 for an inactive one."""
    links: list[list[float]] = []
    for line in (text or "").splitlines():
        if re.match(r"GPU \d+:", line):
            links.append([])
        elif links and (match := re.match(r"\s+Link \d+:\s+(?:([\d.]+) GB/s|<inactive>)", line)):
            links[-1].append(float(match[1] or 0))
    return links if any(links) else None


def parse_ibstat(text: str | None) -> list[dict[str, str]] | None:
    """`ibstat`: name, state, physical state, rate (Gb/s) and link layer of every port."""
    ports: list[dict[str, str]] = []
    adapter = ""
    for line in (text or "").splitlines():
        if match := re.match(r"CA '(.+)'", line):
            adapter = match[1]
        elif match := re.match(r"\s+Port (\d+):", line):
            ports.append({"name": f"{adapter}/{match[1]}"})
        elif ports and (match := re.match(r"\s+(State|Physical state|Rate|Link layer): (.+)", line)):
            ports[-1][match[1].lower()] = match[2].strip()
    return ports or None
