"""Is every node of the job fit to train on? A probe on each node, one judge over all of them.

`probe()` runs on every node and returns plain values (JSON): what nvidia-smi, ibstat, the disks, the clock and the
mounted folders say. `judge()` reads all probes and returns one `Finding` per check. A command that a site lacks, or
that prints something else than expected, gives `not checked`, never a guess. All thresholds are in `LIMITS` and `EXPECTED`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import subprocess
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_lora import govreport

GIB = 2**30
OK, BAD, UNKNOWN = "ok", "bad", "not checked"


@dataclass(frozen=True)
class Limits:
    """What every node must keep, whatever its GPUs."""

    driver_major: int = 535  # oldest data-centre branch from which CUDA 13 images run through forward compatibility
    used_gib: float = 2.0  # more before the job starts means somebody else's process
    temperature_celsius: int = 80  # idle GPUs are far below
    shared_memory_gib: float = 1.0  # docker's default of 64 MiB makes NCCL and data workers die with a bus error
    results_gib: float = 1.0  # logs and one adapter
    clock_skew_seconds: float = 1.0  # events of one log would be out of order


@dataclass(frozen=True)
class Accelerator:
    """What a GPU model must show. Memory in GiB as nvidia-smi reports it, about 1% below the part's own; all-reduce
    bus bandwidth in GB/s: floors that a wrong interface or a dead link misses, well below healthy systems."""

    memory_gib: float
    nvlinks: int
    allreduce_one_node: float
    allreduce_many_nodes: float


LIMITS = Limits()
EXPECTED = {
    "H100": Accelerator(78, 18, 300, 200),  # 81,559 MiB; NVLink 4: 18 links
    "H200": Accelerator(138, 18, 300, 200),  # 143,771 MiB
    "B200": Accelerator(176, 18, 500, 200),  # 183,359 MiB; NVLink 5: 18 links of twice the speed
    "B300": Accelerator(262, 18, 500, 200),
    "GB200": Accelerator(182, 18, 500, 400),  # 72 GPUs share one NVLink domain
    "GB300": Accelerator(272, 18, 500, 400),
}
# Event reasons that slow a GPU down for its health. Idle, application clocks and the power cap are normal.
THROTTLES = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


@dataclass(frozen=True)
class Finding:
    """One check's verdict. `fatal` ones count even with HEALTH=off: without the files there is no run."""

    node: str
    check: str
    verdict: str
    detail: str
    fatal: bool = False


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
        seen["nvlink"] = parse_nvlink(run("nvidia-smi", "nvlink", "--status"))
        seen["infiniband"] = parse_ibstat(run("ibstat"))
    seen["shared_memory_gib"] = _free_gib(Path("/dev/shm"))
    seen["results_gib"] = _free_gib(paths["results"])
    seen["results_writable"] = _writable(paths["results"])
    seen["data"] = _data_files(paths["data"])
    seen["checkpoint"] = _folder_sizes(paths["checkpoint"])
    seen["clock"] = measure_clock(node, nodes, rendezvous)
    return seen


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


def _data_files(folder: Path) -> dict[str, Any]:
    try:
        sizes = {name: (folder / name).stat().st_size for name in ("train.npy", "validation.npy")}
        manifest = govreport.read_manifest(folder)
    except (OSError, ValueError) as error:
        return {"error": str(error)}
    expected = {name: entry["bytes"] for name, entry in manifest["files"].items()} if manifest else None
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
    """`nvidia-smi -q -x`: driver and what is judged of each GPU. Drivers before 535 say throttle reasons."""
    try:
        root = ET.fromstring(xml or "")
    except ET.ParseError:
        return None
    return {"driver": root.findtext("driver_version", ""), "gpus": [_parse_gpu(gpu) for gpu in root.iter("gpu")]}


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


# ---- Judge: once, over all nodes -------------------------------------------------------------------------------------


def judge(probes: Sequence[dict[str, Any]], nodes: int, gpus: int, platform: str, accelerator: str) -> list[Finding]:
    """One finding per node and check, then what only a comparison of the nodes shows."""
    findings = []
    if len(probes) != nodes:
        findings.append(Finding("job", "nodes", BAD, f"{len(probes)} of {nodes} nodes answered the probe", fatal=True))
    for seen in probes:
        checks = [*_file_checks(seen), *_host_checks(seen)]
        if platform == "gpu":
            checks += [
                *_gpu_checks(seen, gpus, EXPECTED.get(accelerator)),
                *_link_checks(seen, nodes, EXPECTED.get(accelerator)),
            ]
        findings += [Finding(seen["host"], *check) for check in checks]
    return findings + [Finding("job", *check) for check in _comparisons(probes, platform)]


Check = tuple[str, str, str] | tuple[str, str, str, bool]


def _file_checks(seen: dict[str, Any]) -> Iterator[Check]:
    data, checkpoint = seen["data"], seen["checkpoint"]
    if "error" in data:
        yield "data", BAD, f"{data['error']}; is DATADIR the folder that download_dataset.py wrote?", True
    elif data["manifest"] is None:
        yield "data", UNKNOWN, "no manifest.json beside the files: run download_dataset.py --check once"
    else:
        wrong = [
            f"{name} has {data['bytes'].get(name)} bytes, manifest says {size}"
            for name, size in data["manifest"].items()
            if data["bytes"].get(name) != size
        ]
        yield ("data", BAD, "; ".join(wrong), True) if wrong else ("data", OK, "sizes agree with the manifest")
    if "error" in checkpoint:
        yield "checkpoint", BAD, f"{checkpoint['error']}; is MODEL the folder of a NeMo checkpoint?", True
    else:
        yield "checkpoint", OK, f"{checkpoint['files']} files, {checkpoint['bytes'] / GIB:.2f} GiB"
    if seen["results_writable"]:
        yield "results", OK, "writable"
    else:
        yield "results", BAD, "LOGDIR cannot be written to by this user", True


def _host_checks(seen: dict[str, Any]) -> Iterator[Check]:
    yield _at_least(
        "shared memory", seen["shared_memory_gib"], LIMITS.shared_memory_gib, "GiB free in /dev/shm; docker: --ipc=host"
    )
    yield _at_least("disk", seen["results_gib"], LIMITS.results_gib, "GiB free under LOGDIR")
    if "error" in seen["clock"]:
        yield (
            "network",
            BAD,
            f"{seen['clock']['error']}; a firewall, or names that resolve to an interface that the nodes do not share?",
        )
    else:
        offset = seen["clock"]["offset_seconds"]
        verdict = OK if abs(offset) <= LIMITS.clock_skew_seconds else BAD
        yield "clock", verdict, f"{offset:+.3f} s from node 0, at most {LIMITS.clock_skew_seconds:g} allowed"


def _at_least(check: str, value: float | None, limit: float, what: str) -> Check:
    if value is None:
        return check, UNKNOWN, what
    return check, OK if value >= limit else BAD, f"{value:.1f} {what}, at least {limit:g} needed"


def _gpu_checks(seen: dict[str, Any], gpus: int, expected: Accelerator | None) -> Iterator[Check]:
    if seen["gpu"] is None:
        yield "gpus", UNKNOWN, "nvidia-smi is absent or failed"
        return
    devices = seen["gpu"]["gpus"]
    yield "gpus", OK if len(devices) == gpus else BAD, f"{len(devices)} of {gpus} GPUs are visible"
    driver = seen["gpu"]["driver"]
    old = not driver.split(".")[0].isdigit() or int(driver.split(".")[0]) < LIMITS.driver_major
    yield "driver", BAD if old else OK, f"driver {driver}, at least {LIMITS.driver_major} needed"
    problems = [f"GPU {i}: {problem}" for i, device in enumerate(devices) for problem in _device_problems(device, expected)]
    yield "gpu state", BAD if problems else OK, "; ".join(problems) or "memory, clocks, ECC, MIG and fabric as expected"
    if unread := sorted(
        {key for device in devices for key, value in device.items() if value is None and key != "application_mhz"}
    ):
        yield "gpu state", UNKNOWN, f"this driver does not report {', '.join(unread)}"


def _device_problems(device: dict[str, Any], expected: Accelerator | None) -> Iterator[str]:
    memory, used = device["memory_gib"], device["used_gib"]
    if expected and memory and memory < expected.memory_gib:
        yield f"{device['name']} has {memory:.0f} GiB, expected at least {expected.memory_gib:g}: is ACCELERATOR right?"
    if used and used > LIMITS.used_gib:
        yield f"{used:.1f} GiB are in use before the job starts: another job or a left-over process"
    if device["temperature"] and device["temperature"] > LIMITS.temperature_celsius:
        yield f"{device['temperature']:.0f} C before any load"
    if device["throttles"]:
        yield f"slowed down by {', '.join(device['throttles'])}"
    clock, highest = device["application_mhz"], device["max_sm_mhz"]
    if clock and highest and clock < 0.9 * highest:
        yield f"application clock {clock:.0f} MHz of {highest:.0f}: reset it with nvidia-smi -rac"
    if device["ecc_uncorrectable"]:
        yield f"{device['ecc_uncorrectable']:.0f} uncorrectable ECC errors since the driver's start: reset or replace it"
    if device["remap_pending"]:
        yield "a memory row waits for remapping or could not be remapped: reset or replace it"
    if device["mig"]:
        yield "MIG is on: switch it off with nvidia-smi -mig 0"
    state, status = device["fabric"]
    if state not in ("N/A", "Not Supported") and (state, status) != ("Completed", "Success"):
        yield f"NVSwitch fabric state {state}, status {status}: is nvidia-fabricmanager running?"


def _link_checks(seen: dict[str, Any], nodes: int, expected: Accelerator | None) -> Iterator[Check]:
    if seen["nvlink"] is None:
        yield "nvlink", UNKNOWN, "nvidia-smi nvlink --status reports no link"
    else:
        usual = statistics.mode(speed for links in seen["nvlink"] for speed in links)
        slow = [
            f"GPU {g} link {i}: {speed:g} GB/s, others {usual:g}"
            for g, links in enumerate(seen["nvlink"])
            for i, speed in enumerate(links)
            if speed < usual
        ]
        few = [
            f"GPU {g} has {len(links)} links of {expected.nvlinks}"
            for g, links in enumerate(seen["nvlink"])
            if expected and len(links) < expected.nvlinks
        ]
        none = [] if usual else ["most links are inactive"]
        yield "nvlink", BAD if none + slow + few else OK, "; ".join(none + slow + few) or f"all links at {usual:g} GB/s"
    if seen["infiniband"] is None:
        yield "infiniband", UNKNOWN, "ibstat is absent or lists no port"
        return
    ports = [p for p in seen["infiniband"] if p.get("link layer") == "InfiniBand" and p.get("physical state") != "Disabled"]
    down = [f"{p['name']} is {p.get('state')}/{p.get('physical state')}" for p in ports if p.get("state") != "Active"]
    if not ports:
        yield "infiniband", UNKNOWN, "no InfiniBand port in use (Ethernet is not judged)"
    else:
        yield "infiniband", BAD if down and nodes > 1 else OK, "; ".join(down) or f"{len(ports)} ports active"


def _comparisons(probes: Sequence[dict[str, Any]], platform: str) -> Iterator[Check]:
    """What must be the same on every node. Files that differ are fatal: the nodes would train on different data."""
    facts: dict[str, Any] = {
        "same data": lambda s: s["data"].get("bytes"),
        "same checkpoint": lambda s: s["checkpoint"],
    }
    if platform == "gpu":
        facts["same driver"] = lambda s: s["gpu"] and s["gpu"]["driver"]
        facts["same GPUs"] = lambda s: s["gpu"] and sorted({d["name"] for d in s["gpu"]["gpus"]})
        facts["same InfiniBand"] = lambda s: (
            s["infiniband"] and sorted(p.get("rate", "") for p in s["infiniband"] if p.get("state") == "Active")
        )
    for check, fact in facts.items():
        values = Counter(str(fact(seen)) for seen in probes)
        if len(values) > 1:
            usual, _ = values.most_common(1)[0]
            odd = [f"{seen['host']}: {fact(seen)}" for seen in probes if str(fact(seen)) != usual]
            yield check, BAD, f"most nodes: {usual}; but {'; '.join(odd)}", check in ("same data", "same checkpoint")


def judge_allreduce(measured: float | None, nodes: int, accelerator: str, floor: float | None = None) -> Finding:
    """Bus bandwidth in GB/s against the floor of this accelerator, or one given."""
    expected = EXPECTED.get(accelerator)
    if floor is None and expected:
        floor = expected.allreduce_one_node if nodes == 1 else expected.allreduce_many_nodes
    if measured is None:
        return Finding("job", "all-reduce", BAD, "the test printed no result")
    if floor is None:
        return Finding("job", "all-reduce", UNKNOWN, f"{measured:.1f} GB/s; no floor for ACCELERATOR={accelerator or 'unset'}")
    text = f"{measured:.1f} GB/s bus bandwidth, at least {floor:g} expected"
    hint = (
        ""
        if measured >= floor
        else ": see NCCL_DEBUG=INFO for the interface taken; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it"
    )
    return Finding("job", "all-reduce", OK if measured >= floor else BAD, text + hint)


def exit_status(findings: Sequence[Finding], mode: str) -> int:
    """1 when a finding must stop the job: fatal ones always, others where mode is `fail`."""
    return int(any(f.verdict == BAD and (f.fatal or mode == "fail") for f in findings))
